# SPDX-License-Identifier: BSD-3-Clause
"""The operator's formula and its gradients in NumPy, written from the formula: the ground truth of the tests.

It shares no code with the operator, its reference or PyTorch's softmax and autograd. Inputs of 16 or 32 bits are
evaluated in float64; float64 inputs in extended precision, which has eleven more bits on x86, so that they are judged too.
"""

from __future__ import annotations

import numpy as np
import torch
from inputs import Inputs
from torch import Tensor


def sum_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1)
    return array.sum(axis=axes, keepdims=True)


def _group_sum(array: np.ndarray, kv_heads: int) -> np.ndarray:
    """[*, H, L, D] -> [*, Hkv, L, D]: the sum over the query heads that share a key and value head."""
    *batch, heads, length, dim = array.shape
    if heads == 0:
        return array
    return array.reshape(*batch, kv_heads, heads // kv_heads, length, dim).sum(axis=-3)


def visible(inputs: Inputs) -> np.ndarray:
    """Which keys each query sees by position, broadcastable to [*, H, Q, K]."""
    q_len, k_len = inputs.query.shape[-2], inputs.key.shape[-2]
    own, key = np.arange(q_len)[:, None] + (k_len - q_len), np.arange(k_len)[None, :]
    seen = np.ones((q_len, k_len), dtype=bool)
    if inputs.is_causal:
        seen &= key <= own
        if inputs.window is not None:
            seen &= own - key < inputs.window
    if inputs.key_lengths is None:
        return seen
    return seen & (key < inputs.key_lengths.cpu().numpy()[..., None, None, None])


def oracle(inputs: Inputs) -> dict[str, np.ndarray]:
    """out, lse, the gradients d_query, ..., and under the same names with a leading "terms_" the sums of the absolute
    values of the terms each was summed from, which scale rounding errors."""
    precision = np.longdouble if inputs.query.dtype == torch.float64 else np.float64

    def widen(tensor: Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.detach().double().cpu().numpy().astype(precision)

    query, key, value, gate, bias, grad_out, grad_lse = (
        widen(getattr(inputs, name)) for name in ("query", "key", "value", "gate", "bias", "grad_out", "grad_lse")
    )
    heads, kv_heads, k_len = query.shape[-3], key.shape[-3], key.shape[-2]
    group = heads // kv_heads if kv_heads else 1
    key, value = np.repeat(key, group, axis=-3), np.repeat(value, group, axis=-3)
    scale = precision(max(query.shape[-1], 1) ** -0.5 if inputs.scale is None else inputs.scale)

    key_t, value_t = np.swapaxes(key, -1, -2), np.swapaxes(value, -1, -2)
    logits = scale * (query @ key_t)
    size = abs(scale) * (abs(query) @ abs(key_t))  # of the terms of a logit
    if bias is not None:
        logits = logits + bias
        size = size + np.where(np.isfinite(bias), abs(bias), 0)
    if inputs.mask is not None:
        attended = np.broadcast_to(inputs.mask.cpu().numpy(), logits.shape)
        logits = np.where(attended, logits, -np.inf)
    logits = np.where(visible(inputs), logits, -np.inf)
    row_max = logits.max(axis=-1, initial=-np.inf, keepdims=True)
    dead = np.isneginf(row_max)
    weights = np.exp(logits - np.where(dead, 0, row_max))  # 0 where not attended
    row_sum = weights.sum(axis=-1, keepdims=True)
    attended_p = weights / np.where(dead, 1, row_sum)
    mean = inputs.masked_rows == "mean" and k_len > 0
    p = np.where(dead, 1 / precision(k_len) if mean else 0, attended_p)
    with np.errstate(divide="ignore"):
        lse = (np.where(dead, 0, row_max) + np.log(row_sum))[..., 0]

    gate_value = np.ones_like(grad_out) if gate is None else np.broadcast_to(1 / (1 + np.exp(-gate)), grad_out.shape)
    gate_slope = gate_value * (1 - gate_value)
    ungated = p @ value
    size_out = p @ abs(value)
    d_ungated = grad_out * gate_value
    dp = d_ungated @ value_t
    delta = (d_ungated * ungated).sum(axis=-1, keepdims=True)
    size_delta = (abs(d_ungated) * size_out).sum(axis=-1, keepdims=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
        size_delta = size_delta + abs(grad_lse)[..., None]
    ds = attended_p * (dp - delta)
    size_ds = attended_p * (abs(d_ungated) @ abs(value_t) + size_delta)

    ds_t, size_ds_t, p_t = (np.swapaxes(x, -1, -2) for x in (ds, size_ds, p))
    results = {
        "out": ungated * gate_value,
        "lse": lse,
        "d_query": scale * (ds @ key),
        "d_key": _group_sum(scale * (ds_t @ query), kv_heads),
        "d_value": _group_sum(p_t @ d_ungated, kv_heads),
        "terms_out": size_out * gate_value,
        "terms_lse": np.where(np.isneginf(lse), 0, abs(lse)),
        "terms_d_query": abs(scale) * (size_ds @ abs(key)),
        "terms_d_key": _group_sum(abs(scale) * (size_ds_t @ abs(query)), kv_heads),
        "terms_d_value": _group_sum(p_t @ abs(d_ungated), kv_heads),
        "terms_logits": np.where(np.isfinite(logits), size, 0),
    }
    if gate is not None:
        results["d_gate"] = sum_to(grad_out * ungated * gate_slope, gate.shape)
        results["terms_d_gate"] = sum_to(abs(grad_out) * size_out * gate_slope, gate.shape)
    if bias is not None:
        results["d_bias"] = sum_to(ds, bias.shape)
        results["terms_d_bias"] = sum_to(size_ds, bias.shape)
    return results


def gold(inputs: Inputs) -> dict[str, Tensor]:
    """`oracle` as float64 tensors."""
    return {name: torch.from_numpy(np.asarray(array, dtype=np.float64)) for name, array in oracle(inputs).items()}
