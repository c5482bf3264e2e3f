# SPDX-License-Identifier: BSD-3-Clause
"""Foundry (rc-foundry), of RosettaFold-3 and RFdiffusion 3: `TriangleAttention` and both pair-biased attentions of tokens.

Calls with local windows of atoms keep the original forward, and so does `LocalAttentionPairBias`, which gathers the keys of
every query. What is checkpointed stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..functional import gated_attention
from ._adapter import Adapter
from ._biases import heads_first, split

__all__ = ["ADAPTERS"]


def _checkpointed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), recomputed in the backward as by Foundry's `activation_checkpointing`, except in torch.func."""
    if not torch.is_grad_enabled() or torch._C._functorch.get_dynamic_layer_stack_depth() > 0:
        return function(*args)
    result: Tensor = checkpoint(function, *args, use_reentrant=False)
    return result


def _triangle(self: Any, pair: Tensor) -> Tensor:
    pair = self.norm(pair)
    bias = self.to_b(pair).movedim(-1, 1).unsqueeze(1)  # [B, L, L, H] -> [B, 1, H, L, L], of columns too as it lies
    pair = pair if self.start_node else pair.transpose(1, 2)
    query, key, value, gate = (
        heads_first(project(pair), self.h) for project in (self.to_q, self.to_k, self.to_v, self.to_g)
    )
    _, bias = split(None, bias, query.dtype)
    out = gated_attention(query, key, value, gate, bias, scale=self.scaling).transpose(-2, -3).flatten(-2)
    result: Tensor = self.to_out(out if self.start_node else out.transpose(1, 2))
    return result


def _tokens(self: Any, a: Tensor, bias: Tensor) -> Tensor:
    """The attention of normalised tokens, [*, L, C], with bias [*, L, L, H], and its output projection."""
    if self.force_bfloat16 or self.use_deepspeed_evo:
        a = a.to(torch.bfloat16)
    query, key, value, gate = (project(a) for project in (self.to_q, self.to_k, self.to_v, self.to_g[0]))  # [*, L, H, D]
    if getattr(self, "kq_norm", False):
        query = self.query_layer_norm(query.flatten(-2)).unflatten(-1, query.shape[-2:]).to(value.dtype)
        key = self.key_layer_norm(key.flatten(-2)).unflatten(-1, key.shape[-2:]).to(value.dtype)
    query, key, value, gate = (x.transpose(-2, -3) for x in (query, key, value, gate))
    _, terms = split(None, bias.movedim(-1, -3), query.dtype)
    out = gated_attention(query, key, value, gate, terms)
    result: Tensor = self.to_a(out.transpose(-2, -3).flatten(-2))
    return result


def _diffusion(self: Any, a: Tensor, s: Tensor, z: Tensor) -> Tensor:
    gate: Tensor = self.linear_output_project(s)
    return gate * _tokens(self, self.ada_ln_1(a, s), self.to_b(self.ln_0(z)))


def _triangle_forward(self: Any, pair: Tensor) -> Tensor:
    return _checkpointed(_triangle, self, pair)


def _pairformer_forward(self: Any, A_I: Tensor, S_I: Any, Z_II: Tensor, Beta_II: Tensor | None = None) -> Tensor:
    if S_I is not None or Beta_II is None:
        original: Tensor = self._original_forward(A_I, S_I, Z_II, Beta_II)
        return original
    return _tokens(self, self.ln_1(A_I), self.to_b(self.ln_0(Z_II)) + Beta_II[..., None])


def _diffusion_forward(self: Any, A_I: Tensor, S_I: Tensor | None, Z_II: Tensor, Beta_II: Any) -> Tensor:
    if S_I is None or Beta_II is not None:  # Beta_II asks for local windows
        original: Tensor = self._original_forward(A_I, S_I, Z_II, Beta_II)
        return original
    return _checkpointed(_diffusion, self, A_I, S_I, Z_II)


def _refuse(module: Any) -> str | None:
    gate = module.to_g
    sigmoid = isinstance(gate, nn.Sequential) and len(gate) == 2 and isinstance(gate[1], nn.Sigmoid)
    return None if sigmoid else "to_g is not a projection and a sigmoid"


_FIRST = ("A_I", "S_I", "Z_II", "Beta_II")
_TOKENS = ("to_q", "to_k", "to_v", "to_b", "to_g", "to_a", "ln_0", "force_bfloat16", "use_deepspeed_evo")

ADAPTERS = (
    Adapter(
        name="Foundry TriangleAttention",
        class_names=frozenset({"TriangleAttention"}),
        first=("pair",),
        others=frozenset(),
        attributes=("norm", "to_q", "to_k", "to_v", "to_b", "to_g", "to_out", "scaling", "h", "start_node"),
        forward=_triangle_forward,
    ),
    Adapter(
        name="Foundry pairformer attention",
        class_names=frozenset({"AttentionPairBiasPairformerDeepspeed"}),
        first=_FIRST,
        others=frozenset(),
        attributes=(*_TOKENS, "ln_1"),
        forward=_pairformer_forward,
        refuse=_refuse,
    ),
    Adapter(
        name="Foundry diffusion attention",
        class_names=frozenset({"AttentionPairBiasDiffusion"}),
        first=_FIRST,
        others=frozenset(),
        attributes=(*_TOKENS, "ada_ln_1", "linear_output_project", "kq_norm"),
        forward=_diffusion_forward,
        refuse=_refuse,
    ),
)
