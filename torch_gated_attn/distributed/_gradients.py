# SPDX-License-Identifier: BSD-3-Clause
"""What both backwards share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ._call import Call

_ops = torch.ops.torch_gated_attn
Gradients = tuple[Tensor | None, ...]  # of query, key, value, gate, bias


@dataclasses.dataclass(frozen=True)
class Residuals:
    """What flows into a backward, and what the forward left, which is of all keys."""

    grad_out: Tensor | None
    grad_lse: Tensor | None
    out: Tensor
    row_max: Tensor
    row_sum: Tensor

    @property
    def grads(self) -> tuple[Tensor | None, Tensor | None]:
        return self.grad_out, self.grad_lse

    @property
    def saved(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.out, self.row_max, self.row_sum


def gate_gradient(call: Call, residuals: Residuals) -> Tensor:
    """From grad_out, out and gate, once: every shard of keys would give it again. The operator gives it without a key."""
    key, value = call.key[..., :0, :], call.value[..., :0, :]
    only_gate = [False, False, False, True, False]
    d_gate: Tensor = _ops._gated_attention_backward(
        *residuals.grads, call.query, key, value, call.gate, None, None, *residuals.saved, call.scale, "zero", only_gate
    )[3]
    return d_gate


def zeros(call: Call, wide: torch.dtype, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Where the gradients of query, key, value and bias add up, for those that are wanted."""
    inputs = call.query, call.key, call.value, call.bias
    contiguous = torch.contiguous_format
    return [
        torch.zeros_like(t, dtype=wide, memory_format=contiguous) if w and t is not None else None
        for t, w in zip(inputs, (*wanted[:3], wanted[4]), strict=True)
    ]


def finished(call: Call, sums: Sequence[Tensor | None], d_gate: Tensor | None) -> Gradients:
    """Rounded once, in the memory order of the arguments; a bias's is contiguous."""
    d_query, d_key, d_value, d_bias = sums
    if d_bias is not None and call.bias is not None:
        d_bias = d_bias.to(call.bias.dtype)
    return _like(d_query, call.query), _like(d_key, call.key), _like(d_value, call.value), d_gate, d_bias


def _like(gradient: Tensor | None, argument: Tensor) -> Tensor | None:
    if gradient is None:
        return None
    result = torch.empty_like(argument)
    same = result.dtype == gradient.dtype and result.stride() == gradient.stride()
    return gradient if same else result.copy_(gradient)
