# SPDX-License-Identifier: BSD-3-Clause
"""Attention modules with the interfaces of Foundry (RosettaFold-3) and alphafold3-pytorch, written for the tests from their
formulas, and calls of them; see foreign.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from foreign import (
    DIM,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LENGTH,
    HeadsToFront,
    heads_first,
    heads_last,
    normal,
    padding,
    softmax_attention,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As Foundry's decorator: the parameters' names are those of `function` alone."""

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else function(*args)

    return wrapper


class Heads(nn.Linear):
    """[*, DIM] -> [*, HEADS, HEAD_DIM]"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (HEADS, HEAD_DIM))


class Tokens(nn.Module):
    """Foundry's attention of tokens; Z [L, L, DIM] counts for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.force_bfloat16 = self.use_deepspeed_evo = False
        self.to_q, self.to_k, self.to_v = (Heads(DIM, HIDDEN, bias=False) for _ in range(3))
        self.to_g = nn.Sequential(Heads(DIM, HIDDEN, bias=False), nn.Sigmoid())
        self.to_b, self.to_a = nn.Linear(DIM, HEADS, bias=False), nn.Linear(HIDDEN, DIM, bias=False)
        self.ln_0, self.ln_1 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def attend(self, a: Tensor, bias: Tensor, norms: Any = None) -> Tensor:
        q, k, v, g = (project(a) for project in (self.to_q, self.to_k, self.to_v, self.to_g))
        if norms is not None:
            q, k = (norm(x.flatten(-2)).unflatten(-1, x.shape[-2:]) for norm, x in zip(norms, (q, k), strict=True))
        logits = torch.einsum("...ihd,...jhd->...ijh", q * HEAD_DIM**-0.5, k) + bias
        return self.to_a((torch.einsum("...ijh,...jhd->...ihd", logits.softmax(-2), v) * g).flatten(-2))


class Foundry:
    class TriangleAttention(nn.Module):
        def __init__(self, start_node: bool = True) -> None:
            super().__init__()
            self.start_node, self.h, self.scaling = start_node, HEADS, HEAD_DIM**-0.5
            self.norm, self.to_b = nn.LayerNorm(DIM), nn.Linear(DIM, HEADS, bias=False)
            self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(3))
            self.to_g, self.to_out = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

        @checkpointed
        def forward(self, pair):
            pair = self.norm(pair)
            bias = self.to_b(pair).movedim(-1, 1).unsqueeze(1)
            pair = pair if self.start_node else pair.transpose(1, 2)
            q, k, v = (heads_first(project(pair)) for project in (self.to_q, self.to_k, self.to_v))
            out = self.to_g(pair).sigmoid() * heads_last(softmax_attention(q, k, v, [bias]))
            return self.to_out(out if self.start_node else out.transpose(1, 2))

    class AttentionPairBiasPairformerDeepspeed(Tokens):
        def forward(self, A_I, S_I, Z_II, Beta_II=None):
            return self.attend(self.ln_1(A_I), self.to_b(self.ln_0(Z_II)) + Beta_II[..., None])

    class AttentionPairBiasDiffusion(Tokens):
        def __init__(self, kq_norm: bool = True) -> None:
            super().__init__()
            self.kq_norm = kq_norm
            self.query_layer_norm, self.key_layer_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
            self.ada_ln_1 = nn.Bilinear(DIM, DIM, DIM)
            self.linear_output_project = nn.Sequential(nn.Linear(DIM, DIM), nn.Sigmoid())

        @checkpointed
        def forward(self, A_I, S_I, Z_II, Beta_II):
            if Beta_II is not None:
                return A_I * 0
            norms = (self.query_layer_norm, self.key_layer_norm) if self.kq_norm else None
            a = self.attend(self.ada_ln_1(A_I, S_I), self.to_b(self.ln_0(Z_II)), norms)
            return self.linear_output_project(S_I) * a


class HeadsOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return heads_first(x)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.is_local_attn, self.enable_attn_softclamp = None, False, False
        self.attn_dropout = nn.Dropout(0.0)


class AlphaFold3Pytorch:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.split_heads = Attend(), HeadsOut()
            self.to_q, self.to_kv = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, 2 * HIDDEN, bias=False)
            self.to_gates = nn.Sequential(nn.Linear(DIM, HIDDEN, bias=False), nn.Sigmoid())
            self.to_out = nn.Linear(HIDDEN, DIM, bias=False)
            self.memory_kv, self.accept_value_residual = None, False

        def forward(
            self,
            seq,
            mask=None,
            context=None,
            windowed_mask=None,
            attn_bias=None,
            return_values=False,
            value_residual=None,
        ):
            k, v = self.to_kv(seq if context is None else context).chunk(2, -1)
            q, k, v = (self.split_heads(x) for x in (self.to_q(seq), k, v))
            terms = [] if attn_bias is None else [attn_bias]
            if mask is not None:
                terms.append(torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -1e30)[:, None, None])
            out = self.to_out(heads_last(self.attend.attn_dropout(softmax_attention(q, k, v, terms))) * self.to_gates(seq))
            return (out, v) if return_values else out

    class TriangleAttention(nn.Module):
        def __init__(self, need_transpose: bool = False) -> None:
            super().__init__()
            self.need_transpose, self.attn, self.dropout = need_transpose, AlphaFold3Pytorch.Attention(), nn.Dropout(0.0)
            self.to_attn_bias = nn.Sequential(nn.Linear(DIM, HEADS, bias=False), HeadsToFront())

        def forward(self, pairwise_repr, mask=None, return_values=False, **kwargs):
            x = pairwise_repr.transpose(1, 2) if self.need_transpose else pairwise_repr
            bias = self.to_attn_bias(x).repeat_interleave(x.size(1), 0)
            mask = None if mask is None else mask.repeat_interleave(x.size(1), 0)
            out, values = self.attn(x.flatten(0, 1), mask=mask, attn_bias=bias, return_values=True, **kwargs)
            out = out.unflatten(0, x.shape[:2])
            out = self.dropout(out.transpose(1, 2) if self.need_transpose else out)
            return (out, values) if return_values else out


def square(mask: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (normal(2, LENGTH, LENGTH, DIM),), {} if mask is None else {"mask": mask}


def tokens(conditioned: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    a, z = normal(2, LENGTH, DIM), normal(LENGTH, LENGTH, DIM)
    return ((a, normal(2, LENGTH, DIM), z, None) if conditioned else (a, None, z, normal(LENGTH, LENGTH))), {}


def alphafold3() -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = {"mask": padding(2, LENGTH).bool(), "attn_bias": normal(2, HEADS, LENGTH, LENGTH)}
    return (normal(2, LENGTH, DIM),), given
