# SPDX-License-Identifier: BSD-3-Clause
"""Boltz: the triangular `Attention` and both versions of `AttentionPairBias`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import gated_attention
from . import openfold
from ._adapter import Adapter
from ._biases import heads_first, split, zero_or_one

__all__ = ["ADAPTERS"]


def _triangular(
    self: Any, q_x: Tensor, kv_x: Tensor, tri_bias: Tensor, mask_bias: Tensor, mask: Tensor, use_kernels: bool = False
) -> Tensor:
    # `mask` says the same as `mask_bias`, which the path without kernels uses; use_kernels chooses an algorithm.
    visible, bias = split(mask_bias, tri_bias, q_x.dtype)
    return openfold.attend(self, self.no_heads, q_x, kv_x, visible, bias)


def _pair_bias(self: Any, s: Tensor, k_in: Tensor, bias: Tensor, mask: Tensor, multiplicity: int) -> Tensor:
    """One row of samples per structure: [B * M, ...] is [B, M, ...], so the bias of a structure is not repeated M times."""

    def samples(x: Tensor) -> Tensor:  # [B * M, L, H * D] -> [B, M, H, L, D]
        return heads_first(torch.unflatten(x, 0, (-1, multiplicity)), self.num_heads)

    query, key, value, gate = (
        samples(self.proj_q(s)),
        samples(self.proj_k(k_in)),
        samples(self.proj_v(k_in)),
        samples(self.proj_g(s)),
    )
    shared = torch.unflatten(mask, 0, (-1, multiplicity if mask.size(0) > 1 else 1))[:, :, None, None]  # [B, M, 1, 1, K]
    visible, terms = zero_or_one(shared, bias.unsqueeze(1), self.inf, query.dtype)
    out = gated_attention(query, key, value, gate, terms, visible, masked_rows="mean")
    result: Tensor = self.proj_o(out.transpose(-2, -3).flatten(-2).flatten(0, 1))
    return result


def _fits(s: Tensor, mask: Tensor, multiplicity: int) -> bool:
    return s.dim() == 3 and mask.dim() == 2 and mask.size(0) in (1, s.size(0)) and s.size(0) % multiplicity == 0


def _pair_bias_1(
    self: Any,
    s: Tensor,
    z: Tensor,
    mask: Tensor,
    multiplicity: int = 1,
    to_keys: Any = None,
    model_cache: dict[str, Tensor] | None = None,
) -> Tensor:
    if not _fits(s, mask, multiplicity):
        original: Tensor = self._original_forward(s, z, mask, multiplicity, to_keys, model_cache)
        return original
    if self.initial_norm:
        s = self.norm_s(s)
    k_in = s
    if to_keys is not None:
        k_in, mask = to_keys(s), to_keys(mask.unsqueeze(-1)).squeeze(-1)
    if model_cache is not None and "z" in model_cache:
        bias = model_cache["z"]
    else:
        bias = self.proj_z(z)  # [B, H, Q, K]
        if model_cache is not None:
            model_cache["z"] = bias
    return _pair_bias(self, s, k_in, bias, mask, multiplicity)


def _pair_bias_2(self: Any, s: Tensor, z: Tensor, mask: Tensor, k_in: Tensor, multiplicity: int = 1) -> Tensor:
    if not _fits(s, mask, multiplicity):
        original: Tensor = self._original_forward(s, z, mask, k_in, multiplicity)
        return original
    return _pair_bias(self, s, k_in, self.proj_z(z), mask, multiplicity)


_PAIR_BIAS = ("proj_q", "proj_k", "proj_v", "proj_g", "proj_z", "proj_o", "num_heads", "head_dim", "inf")

ADAPTERS = (
    Adapter(
        name="Boltz triangular Attention",
        class_names=frozenset({"Attention"}),
        first=("q_x", "kv_x", "tri_bias", "mask_bias", "mask"),
        others=frozenset({"use_kernels"}),
        attributes=("linear_q", "linear_k", "linear_v", "linear_g", "linear_o", "no_heads", "c_hidden"),
        forward=_triangular,
        helpers=("_prep_qkv", "_wrap_up"),
    ),
    Adapter(
        name="Boltz-1 AttentionPairBias",
        class_names=frozenset({"AttentionPairBias"}),
        first=("s", "z", "mask", "multiplicity", "to_keys", "model_cache"),
        others=frozenset(),
        attributes=(*_PAIR_BIAS, "initial_norm"),
        forward=_pair_bias_1,
    ),
    Adapter(
        name="Boltz-2 AttentionPairBias",
        class_names=frozenset({"AttentionPairBias"}),
        first=("s", "z", "mask", "k_in", "multiplicity"),
        others=frozenset(),
        attributes=_PAIR_BIAS,
        forward=_pair_bias_2,
    ),
)
