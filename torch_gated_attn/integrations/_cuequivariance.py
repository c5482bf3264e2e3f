# SPDX-License-Identifier: BSD-3-Clause
"""The operator under the signatures of cuEquivariance (cuequivariance_torch 0.13)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import gated_attention, gated_attention_with_lse
from ._biases import heads_first, split, zero_or_one

__all__ = ["attention_pair_bias", "triangle_attention"]


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
        q: [B, N, H, Q, D]. Of every tensor the leading dimensions of size 1 may be missing: [N, H, Q, D] for B = 1.
        k, v: [B, N, H, K, D], as q.
        bias: [B, 1, H, Q, K], differentiable.
        mask: [B, N, 1, 1, K], nonzero = attend.
        scale: factor of the products; D ** -0.5 if None.
        return_aux: return lse and the largest logit too.
        kv_lengths: [B, N, 1, 1, 1], number of leading keys that exist; in place of `mask`.

    Returns:
        [B, N, H, Q, D], in as many dimensions as q has; with `return_aux` also the logarithm of the sum of the exponentials
        and the largest logit, [B, N, H, Q] in float32 without gradient; the latter allocates [B, N, H, Q, K]. Where `mask`
        hides every key of a row, the mean of v over all keys and -inf; where kv_lengths is 0, zeros.
    """
    if mask is not None and kv_lengths is not None:
        raise ValueError("kv_lengths must be None where mask is given, but both are tensors")
    missing = 5 - q.dim()
    q, k, v, bias = (_raised(x) for x in (q, k, v, bias))
    mask = None if mask is None else _raised(mask).bool()
    if kv_lengths is not None:
        kv_lengths = _raised(kv_lengths)
        mask = torch.arange(k.size(-2), device=k.device) < kv_lengths
    if bias.dtype not in (torch.float32, q.dtype):
        bias = bias.float()
    rows = "mean" if kv_lengths is None else "zero"
    if not return_aux:
        return _lowered(gated_attention(q, k, v, None, bias, mask, scale=scale, masked_rows=rows), missing)
    out, lse = gated_attention_with_lse(q, k, v, None, bias, mask, scale=scale, masked_rows=rows)
    largest = _largest_logit(q, k, bias, mask, scale)
    if kv_lengths is not None:
        empty = (kv_lengths == 0).squeeze(-1)
        lse, largest = lse.masked_fill(empty, 0.0), largest.masked_fill(empty, 0.0)
    return _lowered(out, missing), _lowered(lse.detach(), missing), _lowered(largest, missing)


def _raised(x: Tensor) -> Tensor:
    """x with five dimensions, the missing ones in front and of size 1."""
    return x[(None,) * (5 - x.dim())]


def _lowered(x: Tensor, missing: int) -> Tensor:
    """x without its first `missing` dimensions, of size 1 as q's are."""
    for _ in range(missing):
        x = x.squeeze(0)
    return x


@torch.no_grad()
def _largest_logit(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    logits = (q.float() @ k.float().transpose(-1, -2)) * (q.size(-1) ** -0.5 if scale is None else scale) + bias
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).amax(-1).float()


def attention_pair_bias(
    single_repr: Tensor,
    pair_repr: Tensor,
    mask: Tensor | None,
    num_heads: int,
    w_ln_a: Tensor,
    b_ln_a: Tensor | None,
    w_proj_q: Tensor,
    b_proj_q: Tensor | None,
    w_proj_k: Tensor,
    w_proj_v: Tensor,
    w_proj_g: Tensor,
    w_proj_o: Tensor,
    w_proj_z: Tensor | None = None,
    b_proj_o: Tensor | None = None,
    b_proj_z: Tensor | None = None,
    w_ln_z: Tensor | None = None,
    b_ln_z: Tensor | None = None,
    inf: float = 1e6,
    eps: float | None = 1e-5,
    attn_scale: float | None = None,
    return_z_proj: bool = False,
    is_cached_z_proj: bool = False,
    *,
    b_proj_k: Tensor | None = None,
    b_proj_v: Tensor | None = None,
    w_ln_q: Tensor | None = None,
    b_ln_q: Tensor | None = None,
    w_ln_k: Tensor | None = None,
    b_ln_k: Tensor | None = None,
    b_proj_g: Tensor | None = None,
    norm_kind: str = "layer_norm",
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""cuEquivariance's ``cuequivariance_torch.attention_pair_bias``, algorithm 24 of AlphaFold 3 without conditioning.

    Args:
        single_repr: [B * M, L, C], M samples of each structure in turn.
        pair_repr: [B, L, L, C_z], or the projected bias [B, H, L, L] with `is_cached_z_proj`.
        mask: [B, L] or [B * M, L], 1 = attend; other numbers hide by (1 - mask) * inf, differentiable.
        num_heads: H.
        w_ln_a, b_ln_a: [C], the normalisation of `single_repr`; `w_ln_z`, `b_ln_z`, [C_z], that of `pair_repr`.
        w_proj_q, w_proj_k, w_proj_v, w_proj_g: [H * D, C], with biases b_proj_q, b_proj_k, b_proj_v, b_proj_g, [H * D].
        w_proj_o, b_proj_o: [C, H * D] and [C].
        w_proj_z, b_proj_z: [H, C_z] and [H].
        inf, eps: of the mask and of the normalisations.
        attn_scale: factor of the products; D ** -0.5 if None.
        return_z_proj: return the projected bias too.
        is_cached_z_proj: see pair_repr.
        w_ln_q, b_ln_q, w_ln_k, b_ln_k: [H * D], normalise queries and keys before the heads are split.
        norm_kind: "layer_norm", or "rms_norm" without normalisation biases.
        kv_lengths: [B] or [B * M], number of leading positions that exist; in place of `mask`. Not in cuEquivariance.

    Returns:
        [B * M, L, C], and the projected bias [B, H, L, L] or None. Where `mask` hides every position, attention is the mean
        of the values, where kv_lengths is 0, zero.
    """
    if mask is not None and kv_lengths is not None:
        raise ValueError("kv_lengths must be None where mask is given, but both are tensors")
    if norm_kind not in ("layer_norm", "rms_norm"):
        raise ValueError(f'norm_kind must be "layer_norm" or "rms_norm", but is {norm_kind!r}')
    if w_proj_z is None and not is_cached_z_proj:
        raise ValueError("w_proj_z must be a tensor where pair_repr is not projected yet, but is None")
    if pair_repr.size(0) == 0 or single_repr.size(0) % pair_repr.size(0) != 0:
        raise ValueError(
            f"single_repr must have a multiple of pair_repr's {pair_repr.size(0)} entries, but has {single_repr.size(0)}"
        )

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _normalised(x, weight, bias, eps, norm_kind)

    def samples(x: Tensor) -> Tensor:  # [B * M, L, H * D] -> [B, M, H, L, D]
        return heads_first(torch.unflatten(x, 0, (pair_repr.size(0), -1)), num_heads)

    a = norm(single_repr, w_ln_a, b_ln_a)
    query, key, value, gate = (
        _linear(a, weight, bias)
        for weight, bias in ((w_proj_q, b_proj_q), (w_proj_k, b_proj_k), (w_proj_v, b_proj_v), (w_proj_g, b_proj_g))
    )
    if w_ln_q is not None or b_ln_q is not None:
        query = norm(query, w_ln_q, b_ln_q).to(value.dtype)
    if w_ln_k is not None or b_ln_k is not None:
        key = norm(key, w_ln_k, b_ln_k).to(value.dtype)
    if is_cached_z_proj:
        z = pair_repr
    else:
        assert w_proj_z is not None
        z = _linear(norm(pair_repr, w_ln_z, b_ln_z), w_proj_z, b_proj_z).movedim(-1, 1)  # [B, H, L, L]
    visible, terms = _hide(mask, kv_lengths, z, single_repr, inf, query.dtype)
    query, key, value, gate = (samples(x) for x in (query, key, value, gate))
    rows = "mean" if kv_lengths is None else "zero"
    out = gated_attention(query, key, value, gate, terms, visible, scale=attn_scale, masked_rows=rows)
    result = _linear(out.transpose(-2, -3).flatten(-2).flatten(0, 1), w_proj_o, b_proj_o)
    return result, z if return_z_proj else None


def _hide(
    mask: Tensor | None, kv_lengths: Tensor | None, z: Tensor, single: Tensor, inf: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and bias of the operator, over [B, M, H, L, L]; those of a structure count for all its samples."""
    if kv_lengths is not None:
        mask = torch.arange(single.size(1), device=single.device) < kv_lengths[:, None]
    if mask is None:
        return split(None, z.unsqueeze(1), dtype)
    each = torch.unflatten(mask, 0, (z.size(0), -1))[:, :, None, None]  # [B, M or 1, 1, 1, L]
    return zero_or_one(each, z.unsqueeze(1), inf, dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, kind: str) -> Tensor:
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5 if eps is None else eps)
    if bias is not None:
        raise ValueError("the biases of the normalisations must be None with norm_kind rms_norm, but one is a tensor")
    return F.rms_norm(x, x.shape[-1:], weight, eps)
