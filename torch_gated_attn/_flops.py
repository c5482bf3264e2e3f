# SPDX-License-Identifier: BSD-3-Clause
"""Formulas for torch.utils.flop_counter: the matrix products of attention, hidden keys included, as PyTorch counts
those of scaled_dot_product_attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# Shapes, as the flop counter passes them in the place of tensors.
Shape = tuple[int, ...]


def _product(query: Shape, key: Shape, size: int) -> int:
    """One product of [*, H, Q, K] with vectors of `size`: a multiplication and an addition each."""
    return 2 * math.prod(query[:-1]) * key[-2] * size


def _forward(query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _product(query, key, query[-1]) + _product(query, key, value[-1])


def _backward(grad_out: Any, grad_lse: Any, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    # args: gate, bias, mask, out, row_max, row_sum, scale, masked_rows, grad_mask and what was appended to the schema
    grad_mask: list[bool] = args[8]
    d_query, d_key, d_value, _, d_bias = grad_mask
    d_logits = d_query or d_key or d_bias
    by_head_dim = (d_logits or d_value) + d_query + d_key  # the logits are computed again
    by_value_dim = d_logits + d_value
    return by_head_dim * _product(query, key, query[-1]) + by_value_dim * _product(query, key, value[-1])


def register() -> None:
    """Register both formulas; called once, when the package is imported."""
    register_flop_formula(torch.ops.torch_gated_attn._gated_attention_forward)(_forward)
    register_flop_formula(torch.ops.torch_gated_attn._gated_attention_backward)(_backward)
