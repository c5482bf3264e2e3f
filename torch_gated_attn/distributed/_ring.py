# SPDX-License-Identifier: BSD-3-Clause
"""Local queries against keys and values that travel round the group; bias, mask and their gradients stay.

Each step runs the operator on the shard at hand and merges. The operator's backward, given the merged out, row_max and
row_sum, returns a shard's exact part of every gradient, so nothing else is kept. Gradients of keys and values travel with
them, one step behind, in the accumulation type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ._call import Call, Places, places
from ._gradients import Gradients, Residuals, finished, gate_gradient, zeros
from ._merge import Merge, Results, mean_to_value
from ._travel import Arrival, Travel
from ._visible import Shard, columns, visible

_ops = torch.ops.torch_gated_attn


def _steps(call: Call, at: Places, travel: Travel) -> Iterator[tuple[int, Tensor, Tensor, Shard | None]]:
    """The number of keys of the next shard, key and value of this one, and how it is seen."""
    shard = [call.key, call.value]
    for step in range(at.count):
        source = (at.rank - step) % at.count
        following = at.keys[source - 1]
        arrive = travel.start(shard, following) if step + 1 < at.count else None
        yield following, shard[0], shard[1], visible(call, columns(call.mask, *at.key_range(source)), at, source)
        if arrive is not None:
            shard = arrive()


def forward(call: Call) -> Results:
    at = places(call, queries_are_split=True)
    out, merge = call.empty_result(at.all_keys), Merge(call)
    for _, key, value, shard in _steps(call, at, Travel(call.group)):
        if shard is not None:
            bias = columns(call.bias, shard.begin, shard.end)
            part, _, row_max, row_sum = _ops._gated_attention_forward(
                call.query, key, value, call.gate, bias, shard.mask, call.scale, "zero", *shard.visibility
            )
            merge.add(part, row_max, row_sum)
    return merge.result(call, out, at.all_keys)


def backward(call: Call, residuals: Residuals, wanted: Sequence[bool]) -> Gradients:
    need_query, need_key, need_value, need_gate, need_bias = wanted
    at, travel = places(call, queries_are_split=True), Travel(call.group)
    wide = residuals.row_sum.dtype
    d_query, _, _, d_bias = zeros(call, wide, [need_query, False, False, False, need_bias])
    back: Arrival | None = None
    for following, key, value, shard in _steps(call, at, travel):
        mine = [torch.zeros_like(t, dtype=wide) for t, need in ((key, need_key), (value, need_value)) if need]
        if shard is not None:
            dq, dk, dv, _, db = _ops._gated_attention_backward(
                *residuals.grads, call.query, key, value, call.gate, columns(call.bias, shard.begin, shard.end),
                shard.mask, *residuals.saved, call.scale, "zero",
                [need_query, need_key, need_value, False, need_bias], *shard.visibility
            )  # fmt: skip
            _add((d_query,), (dq,))
            _add((columns(d_bias, shard.begin, shard.end),), (db,))
            _add(mine, [g for g in (dk, dv) if g is not None])
        if back is not None:  # what the processes before this one added for this shard
            _add(mine, back())
        if mine:
            back = travel.start(mine, following)  # the last time it brings ours home
    home = iter(back() if back is not None else ())
    d_key, d_value = (next(home) if need else None for need in (need_key, need_value))
    if d_value is not None and call.masked_rows == "mean" and residuals.grad_out is not None:
        from_dead_rows = mean_to_value(call, residuals.grad_out, residuals.row_sum, at.all_keys)
        dist.all_reduce(from_dead_rows, group=call.group)
        d_value += from_dead_rows
    return finished(call, (d_query, d_key, d_value, d_bias), gate_gradient(call, residuals) if need_gate else None)


def _add(sums: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(sums, parts, strict=True):
        if total is not None and part is not None:
            total += part
