# SPDX-License-Identifier: BSD-3-Clause
"""The operator under the signatures of other kernels, to replace their import.

    from torch_gated_attn.integrations.functions import DS4Sci_EvoformerAttention
    from torch_gated_attn.integrations.functions import triangle_attention, attention_pair_bias  # cuEquivariance's
    from torch_gated_attn.integrations.functions import trifast_triangle_attention    # trifast's

Of them only attention_pair_bias has a gate. They take any device, dtype, length and head_dim of the operator, where the
originals are limited.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import gated_attention
from ._biases import split
from ._cuequivariance import attention_pair_bias, triangle_attention
from ._transformers import attend

__all__ = [
    "DS4Sci_EvoformerAttention",
    "attention_pair_bias",
    "register_transformers",
    "triangle_attention",
    "trifast_triangle_attention",
]


def DS4Sci_EvoformerAttention(Q: Tensor, K: Tensor, V: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
    r"""DeepSpeed's ``deepspeed.ops.deepspeed4science.DS4Sci_EvoformerAttention``.

    softmax(Q K^T / sqrt(D) + bias1 + bias2) V over sequences of an alignment.

    Args:
        Q, K, V: [B, N, L, H, D], the heads after the positions; any number of leading dimensions.
        biases: at most two, either may be None. bias1, [B, N, 1, 1, L], is the additive mask of the keys: constant, it
            becomes a boolean one (as in :func:`torch_gated_attn.integrations.patch`), otherwise it is differentiable.
            bias2, [B, 1, H, L, L], is the pair bias, differentiable.

    Returns:
        [B, N, L, H, D]. Where bias1 hides every key of a row, the mean of V over all keys.
    """
    if len(biases) > 2:
        raise ValueError(f"biases must hold at most 2 tensors, but holds {len(biases)}")
    query, key, value = (x.transpose(-2, -3) for x in (Q, K, V))
    first, pair = (*biases, None, None)[:2]  # a pair bias alone comes as [None, bias2]
    mask, bias = split(first, pair, query.dtype)
    return gated_attention(query, key, value, None, bias, mask, masked_rows="mean").transpose(-2, -3)


def trifast_triangle_attention(q: Tensor, k: Tensor, v: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    r"""trifast's ``trifast.triangle_attention``.

    Args:
        q, k, v: [B, H, N, N, D], the heads before the rows.
        b: [B, H, N, N], the pair bias, differentiable.
        mask: bool, [B, N, N], **True = hidden**, of keys [row, key].

    Returns:
        [B, H, N, N, D]. Where every key of a row is hidden, the mean of v over all keys.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = hidden), but is {mask.dtype}")
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, H, N, D]
    if b.dtype not in (torch.float32, q.dtype):
        b = b.to(q.dtype)
    visible = mask.logical_not()[:, :, None, None]
    return gated_attention(query, key, value, None, b.unsqueeze(1), visible, masked_rows="mean").transpose(1, 2)


def _transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, Q, D] and [B, Hkv, K, D] to [B, Q, H, D]; masks as for its "sdpa".

    `position_bias`, [B or 1, H, Q, K], is added to the logits (the T5 family) and differentiable.
    """
    if dropout > 0:
        raise ValueError(f"dropout must be 0 with attn_implementation torch_gated_attn, but is {dropout}")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be None with attn_implementation torch_gated_attn, but is given")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attend(query, key, value, None, attention_mask, causal=bool(causal), scale=scaling, position_bias=position_bias)
    return out, None


def register_transformers(name: str = "torch_gated_attn") -> None:
    """Offer the operator to Hugging Face transformers as `attn_implementation=name`.

    Registers it with `AttentionInterface`, and the boolean masks of "sdpa" with `AttentionMaskInterface`. The gate of a
    model that has one stays outside; `patch` takes it in. A position bias (T5's) goes in, with its gradient. Dropout, soft
    capping and sinks are errors.
    """
    transformers = importlib.import_module("transformers")
    masks = importlib.import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(name, _transformers_attention)
    transformers.AttentionMaskInterface.register(name, masks.sdpa_mask)
