# SPDX-License-Identifier: BSD-3-Clause
"""Gated attention in plain PyTorch: the specification that the operator is tested against.

Called with float64 inputs it is the ground truth; called with the inputs' own dtype it is what a user would write
without the operator. It allocates [*, H, Q, K] several times and runs on any device. It checks no arguments, and it
does not promise what the operator promises about NaN in masked keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gated_attention", "gated_attention_with_lse"]


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    masked_rows: str = "zero",
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch version of :func:`torch_gated_attn.gated_attention`, same arguments."""
    return gated_attention_with_lse(
        query,
        key,
        value,
        gate,
        bias,
        mask,
        scale=scale,
        masked_rows=masked_rows,
        is_causal=is_causal,
        window=window,
        key_lengths=key_lengths,
    )[0]


def gated_attention_with_lse(
    query: Tensor,  # [*, H, Q, D]
    key: Tensor,  # [*, Hkv, K, D]
    value: Tensor,  # [*, Hkv, K, Dv]
    gate: Tensor | None = None,  # broadcastable to [*, H, Q, Dv]
    bias: Tensor | None = None,  # broadcastable to [*, H, Q, K]
    mask: Tensor | None = None,  # broadcastable to [*, H, Q, K]
    *,
    scale: float | None = None,
    masked_rows: str = "zero",
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch version of :func:`torch_gated_attn.gated_attention_with_lse`, same arguments."""
    if masked_rows not in ("zero", "mean"):
        raise ValueError(f'masked_rows must be "zero" or "mean", but is "{masked_rows}"')
    heads, kv_heads, head_dim, k_len = query.size(-3), key.size(-3), query.size(-1), key.size(-2)
    if kv_heads != heads:
        key = key.repeat_interleave(heads // kv_heads, dim=-3)
        value = value.repeat_interleave(heads // kv_heads, dim=-3)
    if scale is None:
        scale = head_dim**-0.5 if head_dim > 0 else 1.0

    logits = scale * (query @ key.transpose(-1, -2))  # [*, H, Q, K]
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    logits = logits.masked_fill(~_visible(query.size(-2), k_len, is_causal, window, key_lengths, query.device), -torch.inf)

    # A dead row attends to nothing. Its logits are replaced before the softmax, so that no NaN arises that a gradient
    # could carry back, and its probabilities and lse after it.
    dead = (logits == -torch.inf).all(dim=-1, keepdim=True)  # [*, H, Q, 1]
    logits = logits.masked_fill(dead, 0.0)
    dead_probability = 1.0 / k_len if masked_rows == "mean" and k_len > 0 else 0.0
    probabilities = torch.softmax(logits, dim=-1).masked_fill(dead, dead_probability)
    wide_logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = torch.logsumexp(wide_logits, dim=-1).masked_fill(dead.squeeze(-1), -torch.inf)  # [*, H, Q]

    out = probabilities.to(value.dtype) @ value  # [*, H, Q, Dv]
    if gate is not None:
        out = out * torch.sigmoid(gate)
    return out, lse


def _visible(
    queries: int, keys: int, is_causal: bool, window: int | None, key_lengths: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys each query sees, bool, broadcastable to [*, H, Q, K]. Query i stands at key position K - Q + i."""
    key = torch.arange(keys, device=device)
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if is_causal:
        visible = visible & (key <= position)
    if window is not None:
        visible = visible & (key > position - window)
    if key_lengths is not None:
        visible = visible & (key < key_lengths[..., None, None, None])
    return visible
