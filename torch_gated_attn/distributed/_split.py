# SPDX-License-Identifier: BSD-3-Clause
"""Whole queries against local keys, with their columns of bias and mask: only numerators and denominators are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ._call import Call, places
from ._gradients import Gradients, Residuals, finished, gate_gradient, zeros
from ._merge import Merge, Results, finite, mean_to_value
from ._visible import visible

_ops = torch.ops.torch_gated_attn


def forward(call: Call) -> Results:
    at = places(call, queries_are_split=False)
    into, merge = call.empty_result(call.key.shape[-2]), Merge(call)
    shard = visible(call, call.mask, at, at.rank)
    if shard is not None:
        part, _, row_max, row_sum = _ops._gated_attention_forward(
            call.query, call.key, call.value, call.gate, call.bias, shard.mask, call.scale, "zero", *shard.visibility
        )
        merge.add(part, row_max, row_sum)
    own_shift = merge.shift
    merge.shift = own_shift.clone()
    dist.all_reduce(merge.shift, dist.ReduceOp.MAX, call.group)
    weight = (own_shift - finite(merge.shift)).exp2()
    sums = torch.cat([merge.numerator, merge.sum.unsqueeze(-1)], -1) * weight.unsqueeze(-1)
    dist.all_reduce(sums, group=call.group)
    merge.numerator, merge.sum = sums[..., :-1], sums[..., -1].contiguous()
    return merge.result(call, into, at.all_keys)


def backward(call: Call, residuals: Residuals, wanted: Sequence[bool]) -> Gradients:
    need_query, need_key, need_value, need_gate, need_bias = wanted
    at = places(call, queries_are_split=False)
    sums = zeros(call, residuals.row_sum.dtype, wanted)
    shard = visible(call, call.mask, at, at.rank)
    if shard is not None:
        dq, dk, dv, _, db = _ops._gated_attention_backward(
            *residuals.grads, call.query, call.key, call.value, call.gate, call.bias, shard.mask, *residuals.saved,
            call.scale, "zero", [need_query, need_key, need_value, False, need_bias], *shard.visibility
        )  # fmt: skip
        for total, part in zip(sums, (dq, dk, dv, db), strict=True):
            if total is not None:
                total += part
    d_query, _, d_value, _ = sums
    if d_query is not None:
        dist.all_reduce(d_query, group=call.group)
    if d_value is not None and call.masked_rows == "mean" and residuals.grad_out is not None:
        d_value += mean_to_value(call, residuals.grad_out, residuals.row_sum, at.all_keys)
    return finished(call, sums, gate_gradient(call, residuals) if need_gate else None)
