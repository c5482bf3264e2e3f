# SPDX-License-Identifier: BSD-3-Clause
"""The operators as Python functions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _context_parallel
from ._arguments import check_call, check_tensor

__all__ = ["gate_output", "gated_attention", "gated_attention_with_lse"]


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
    r"""Attention with an additive bias, a mask and a sigmoid gate, differentiable, without a [Q, K] tensor in memory.

    For every batch index, head and query i, over the keys j with mask_ij:

    .. math::
        s_{ij} = \mathrm{scale}\,\langle q_i, k_j\rangle + \mathrm{bias}_{ij} \qquad
        p_{ij} = \mathrm{softmax}_j(s_{ij}) \qquad
        \mathrm{out}_i = \sigma(\mathrm{gate}_i) \odot \sum_j p_{ij} v_j

    the attention of AlphaFold 2 (Jumper et al. 2021, supplementary algorithms 7 and 13) with an optional gate.

    Args:
        query: [\*, H, Q, D], float32, float64, bfloat16 or float16; `*` is any number of batch dimensions.
        key: [\*, Hkv, K, D], as query in dtype and batch dimensions; Hkv divides H, 1 is multi-query attention.
        value: [\*, Hkv, K, Dv], as query.
        gate: raw logits, broadcastable to [\*, H, Q, Dv], as query in dtype; [\*, H, Q, 1] is a gate per head.
        bias: broadcastable to [\*, H, Q, K] over any subset of dimensions, in query's dtype or float32. It is read in
            place and its gradient is summed in place; neither is expanded in memory.
        mask: bool, broadcastable to [\*, H, Q, K], True = attend.
        scale: factor of the products, a number; D ** -0.5 if None. One that is learned multiplies `query`.
        masked_rows: result of a query that attends to no key (or only through logits of -inf): "zero", or "mean" for
            sigmoid(gate) times the mean of all values, which is what AlphaFold's additive -1e9 mask computes.
        is_causal: query i attends to key j only if j <= K - Q + i: the last query stands at the last key.
        window: of those, only to the last `window` keys, its own position included; needs `is_causal`.
        key_lengths: [\*], int32 or int64, number of leading keys of each batch entry that exist; positions do not shift.

    Returns:
        [\*, H, Q, Dv] in query's dtype. Its dimensions lie in memory in the order of query's strides, so a
        [B, L, H, D] buffer seen as [B, H, L, D] comes back as one.

    Raises:
        TypeError: a dtype is not one of the above, a tensor is none, or `scale` is a tensor.
        ValueError: a shape does not fit, `masked_rows` is unknown, or `window` comes without `is_causal`.
        RuntimeError: the arguments are on different devices, or on one that the library was not built for.

    What no query sees costs nothing: keys behind a query's position, before its window or beyond a length, and tiles of a
    mask in which nothing is attended, are neither read nor computed, forward and backward.

    Sums are float32 (float64 for float64) whatever the dtype. Results and gradients are the same bits for any number of
    threads. Gradients have the shape and dtype of their input; the mask has none.

    head_dims above 128 on a CUDA device are computed by PyTorch's ``scaled_dot_product_attention`` followed by
    :func:`gate_output` where it can do the same. For these the promises on bits, memory order and NaN in hidden keys are
    PyTorch's, and gradients cannot be differentiated again; ``torch.use_deterministic_algorithms(True)`` keeps to the
    operator. :func:`explain` says which.
    """
    check_call(query, key, value, gate, bias, mask, key_lengths, scale)
    _context_parallel.refuse()
    out: Tensor = torch.ops.torch_gated_attn.gated_attention(
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
    )
    return out


def gated_attention_with_lse(
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
) -> tuple[Tensor, Tensor]:
    r"""As :func:`gated_attention`, and the logarithm of each row's softmax denominator.

    .. math:: \mathrm{lse}_i = \log \sum_j \exp(s_{ij})

    With it, results over parts of the keys can be merged, or a sink added, after the call.

    Returns:
        out, [\*, H, Q, Dv] in query's dtype, and lse, [\*, H, Q] in float32 (float64 for float64), which is
        differentiable too. Where a row attends to no key, lse is -inf and has no gradient.
    """
    check_call(query, key, value, gate, bias, mask, key_lengths, scale)
    _context_parallel.refuse()
    out, lse = torch.ops.torch_gated_attn.gated_attention_with_lse(
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
    )
    return out, lse


def gate_output(out: Tensor, gate: Tensor) -> Tensor:
    r"""out * sigmoid(gate), differentiable, in one pass over memory each way.

    For attention that another library computed, such as a flash attention with head_dim 256:

    .. math:: \mathrm{result} = \mathrm{out} \odot \sigma(\mathrm{gate})

    Args:
        out: any shape, float32, float64, bfloat16 or float16.
        gate: raw logits in out's dtype, broadcastable to out; any strides, so half of a packed projection is read in place.

    Returns:
        As out, in its memory order. The sigmoid and the products are float32 (float64 for float64), rounded once. Gradients
        have the shape of their input and keep nothing but `out` and `gate`.
    """
    check_tensor("out", out)
    check_tensor("gate", gate)
    result: Tensor = torch.ops.torch_gated_attn.gate_output(out, gate)
    return result
