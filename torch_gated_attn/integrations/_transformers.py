# SPDX-License-Identifier: BSD-3-Clause
"""What Hugging Face transformers means by a mask and by causal, as one call of the operator."""

from __future__ import annotations

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
) -> Tensor:
    """[B, L, H, D] of query [B, H, L, D]. A mask that is given holds all there is to hide; it is boolean or additive."""
    causal = causal and attention_mask is None and query.size(2) > 1
    if causal:  # keys beyond the queries are the empty slots of a static cache
        key, value = key[:, :, : query.size(2)], value[:, :, : query.size(2)]
    additive = attention_mask is not None and attention_mask.is_floating_point()
    out = gated_attention(
        query,
        key,
        value,
        gate,
        attention_mask if additive else None,
        None if additive else attention_mask,
        scale=scale,
        is_causal=causal,
    )
    return out.transpose(1, 2)
