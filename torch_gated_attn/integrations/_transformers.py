# SPDX-License-Identifier: BSD-3-Clause
"""What Hugging Face transformers means by a mask and by causal, as one call of the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import gated_attention

__all__ = ["attend"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    attention_mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """[B, L, H, D] of query [B, H, L, D]. A mask that is given holds all there is to hide; it is boolean or additive."""
    causal = causal and attention_mask is None
    # Keys beyond the queries are the empty slots of a static cache; a single query is decoding, and sees them all. A length
    # is compared in an `if` only: under dynamic shapes the comparison is no bool that the operator would take.
    if causal and query.size(2) > 1:
        key, value = key[:, :, : query.size(2)], value[:, :, : query.size(2)]
        position_bias = None if position_bias is None else position_bias[..., : query.size(2)]
    additive = attention_mask is not None and attention_mask.is_floating_point()
    bias, mask = (attention_mask, None) if additive else (None, attention_mask)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    if bias is not None and bias.dtype not in (torch.float32, query.dtype):
        bias = bias.to(query.dtype)
    out = gated_attention(query, key, value, gate, bias, mask, scale=scale, is_causal=causal)
    return out.transpose(1, 2)
