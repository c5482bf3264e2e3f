# SPDX-License-Identifier: BSD-3-Clause
"""Results of the operator over parts of the keys become the result over all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ._call import Call

_LOG2E = 1.4426950408889634
Results = tuple[Tensor, Tensor, Tensor, Tensor]  # out, lse, row_max, row_sum


def shift_of(row_max: Tensor, row_sum: Tensor) -> Tensor:
    """A row that attends to no key of a part has any row_max, which must not count."""
    return row_max.masked_fill(row_sum == 0, -torch.inf)


def finite(shift: Tensor) -> Tensor:
    """Lest -inf - -inf be NaN; what it scales is 0 there."""
    return shift.masked_fill(shift == -torch.inf, 0)


class Merge:
    """The running sum_j 2^(s_ij - shift_i) (v_j | 1), rescaled as the shift grows; `out` may be gated, which is linear."""

    def __init__(self, call: Call) -> None:
        wide = torch.promote_types(call.query.dtype, torch.float32)
        self.sum = call.query.new_zeros(call.query.shape[:-1], dtype=wide)
        self.shift = torch.full_like(self.sum, -torch.inf)
        self.numerator = self.sum.new_zeros(*self.sum.shape, call.value.shape[-1])

    def add(self, out: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
        shift = shift_of(row_max, row_sum)
        top = torch.maximum(self.shift, shift)
        old = (self.shift - finite(top)).exp2()
        new = (shift - finite(top)).exp2() * row_sum
        self.numerator.mul_(old.unsqueeze(-1)).addcmul_(out.to(new.dtype), new.unsqueeze(-1))
        self.sum = self.sum * old + new
        self.shift = top

    def result(self, call: Call, into: Tensor, keys: int) -> Results:
        """`into` is filled and returned, `keys` is how many there are in all."""
        dead = self.sum == 0
        out = self.numerator / self.sum.masked_fill(dead, 1).unsqueeze(-1)
        if call.masked_rows == "mean":
            out = torch.where(dead.unsqueeze(-1), _gated(call, _mean_of_values(call, keys)), out)
        shift = finite(self.shift)
        lse = ((shift + self.sum.log2()) / _LOG2E).masked_fill(dead, -torch.inf)
        return into.copy_(out), lse, shift, self.sum


def _gated(call: Call, tensor: Tensor) -> Tensor:
    return tensor if call.gate is None else tensor * call.gate.to(tensor.dtype).sigmoid()


def _mean_of_values(call: Call, keys: int) -> Tensor:
    """[*, H, 1, Dv], of all processes: what masked_rows = "mean" puts into rows that attend to no key."""
    wide = torch.promote_types(call.value.dtype, torch.float32)
    mean = call.value.to(wide).sum(-2, keepdim=True) / max(keys, 1)
    dist.all_reduce(mean, group=call.group)
    heads, kv_heads = call.query.shape[-3], call.value.shape[-3]
    return mean.repeat_interleave(heads // max(kv_heads, 1), -3)


def mean_to_value(call: Call, grad_out: Tensor, row_sum: Tensor, keys: int) -> Tensor:
    """[*, Hkv, 1, Dv]: what every value gets from this process's rows that attend to no key."""
    d = _gated(call, grad_out.to(row_sum.dtype)) * (row_sum == 0).unsqueeze(-1)
    groups = torch.unflatten(d.sum(-2, keepdim=True), -3, (call.value.shape[-3], -1))  # heads by their key/value head
    return groups.sum(-3) / max(keys, 1)
