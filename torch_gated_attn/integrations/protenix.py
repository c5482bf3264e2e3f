# SPDX-License-Identifier: BSD-3-Clause
"""Protenix `Attention` (of the pair-biased attention; its triangular one is OpenFold's, see openfold.py).

Calls with local windows (n_queries, n_keys or a bias cut into windows) keep the original forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import openfold
from ._adapter import Adapter

__all__ = ["ADAPTERS"]


def _forward(
    self: Any,
    q_x: Tensor,
    kv_x: Tensor,
    attn_bias: Tensor | None = None,
    trunked_attn_bias: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> Tensor:
    local = trunked_attn_bias is not None or options.get("n_queries") or options.get("n_keys")
    if args or local or q_x.shape[:-2] != kv_x.shape[:-2]:
        original: Tensor = self._original_forward(q_x, kv_x, attn_bias, trunked_attn_bias, *args, **options)
        return original
    if attn_bias is not None:
        if attn_bias.dim() != q_x.dim() + 1:
            attn_bias = attn_bias.unsqueeze(-3)  # [*, Q, K] -> [*, 1, Q, K]
        if attn_bias.dtype not in (torch.float32, q_x.dtype):
            attn_bias = attn_bias.to(q_x.dtype)
    return openfold.attend(self, self.num_heads, q_x, kv_x, None, attn_bias)


ADAPTERS = (
    Adapter(
        name="Protenix Attention",
        class_names=frozenset({"Attention"}),
        first=("q_x", "kv_x", "attn_bias", "trunked_attn_bias"),
        others=frozenset({"n_queries", "n_keys", "inf", "inplace_safe", "chunk_size"}),
        attributes=("linear_q", "linear_k", "linear_v", "linear_g", "linear_o", "num_heads", "c_hidden"),
        forward=_forward,
        helpers=("_prep_qkv", "_wrap_up"),
    ),
)
