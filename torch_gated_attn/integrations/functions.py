# SPDX-License-Identifier: BSD-3-Clause
"""The operator under the signatures of other kernels, to replace their import.

    from torch_gated_attn.integrations.functions import DS4Sci_EvoformerAttention
    from torch_gated_attn.integrations.functions import triangle_attention            # cuEquivariance's
    from torch_gated_attn.integrations.functions import trifast_triangle_attention    # trifast's

None of them has a gate; they take any device, dtype, length and head_dim of the operator, where the originals are limited.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import gated_attention, gated_attention_with_lse
from ._biases import merge
from ._transformers import attend

__all__ = ["DS4Sci_EvoformerAttention", "register_transformers", "triangle_attention", "trifast_triangle_attention"]


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
    # bias1 is a mask by its place: a pair bias alone comes as [None, bias2].
    first = biases[0] if biases else None
    mask, bias = merge([first] if first is not None else [], (2, 2), query.dtype)
    if len(biases) == 2 and biases[1] is not None:
        pair = biases[1] if biases[1].dtype == torch.float32 else biases[1].to(query.dtype)
        bias = pair if bias is None else bias + pair
    return gated_attention(query, key, value, None, bias, mask, masked_rows="mean").transpose(-2, -3)


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_aux: bool = False,
    *,
    kv_lengths: Tensor | None = None,
) -> Any:
    r"""cuEquivariance's ``cuequivariance_torch.triangle_attention``.

    Args:
        q: [B, N, H, Q, D], or [N, H, Q, D] for B = 1.
        k, v: [B, N, H, K, D], as q.
        bias: [B, 1, H, Q, K], differentiable.
        mask: [B, N, 1, 1, K], nonzero = attend.
        scale: factor of the products; D ** -0.5 if None.
        return_aux: return lse and the largest logit too.
        kv_lengths: [B, N, 1, 1, 1], number of leading keys that exist; in place of `mask`.

    Returns:
        [B, N, H, Q, D]; with `return_aux` also the logarithm of the sum of the exponentials and the largest logit,
        [B, N, H, Q] in float32 without gradient; the latter allocates [B, N, H, Q, K]. Where `mask` hides every key of a
        row, the mean of v over all keys and -inf; where kv_lengths is 0, zeros.
    """
    if mask is not None and kv_lengths is not None:
        raise ValueError("kv_lengths must be None where mask is given, but both are tensors")
    if kv_lengths is not None:
        mask = torch.arange(k.size(-2), device=k.device) < kv_lengths
    if bias.dtype not in (torch.float32, q.dtype):
        bias = bias.float()
    mask = None if mask is None else mask.bool()
    rows = "mean" if kv_lengths is None else "zero"
    if not return_aux:
        return gated_attention(q, k, v, None, bias, mask, scale=scale, masked_rows=rows)
    out, lse = gated_attention_with_lse(q, k, v, None, bias, mask, scale=scale, masked_rows=rows)
    largest = _largest_logit(q, k, bias, mask, scale)
    if kv_lengths is not None:
        empty = (kv_lengths == 0).squeeze(-1)
        lse, largest = lse.masked_fill(empty, 0.0), largest.masked_fill(empty, 0.0)
    return out, lse.detach(), largest


@torch.no_grad()
def _largest_logit(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    logits = (q.float() @ k.float().transpose(-1, -2)) * (q.size(-1) ** -0.5 if scale is None else scale) + bias
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).amax(-1).float()


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, Q, D] and [B, Hkv, K, D] to [B, Q, H, D]; masks as for its "sdpa"."""
    if dropout > 0:
        raise ValueError(f"dropout must be 0 with attn_implementation torch_gated_attn, but is {dropout}")
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be None with attn_implementation torch_gated_attn, but is given")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return attend(query, key, value, None, attention_mask, causal=bool(causal), scale=scaling), None


def register_transformers(name: str = "torch_gated_attn") -> None:
    """Offer the operator to Hugging Face transformers as `attn_implementation=name`.

    Registers it with `AttentionInterface`, and the boolean masks of "sdpa" with `AttentionMaskInterface`. The gate of a
    model that has one stays outside; `patch` takes it in. Dropout, soft capping, a position bias and sinks are errors.
    """
    transformers = importlib.import_module("transformers")
    masks = importlib.import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(name, _transformers_attention)
    transformers.AttentionMaskInterface.register(name, masks.sdpa_mask)
