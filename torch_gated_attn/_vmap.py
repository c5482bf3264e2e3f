# SPDX-License-Identifier: BSD-3-Clause
"""Batching rules: torch.vmap becomes one call of the fused kernel with one more batch dimension, where PyTorch would loop.

The operator takes any number of batch dimensions, so nothing is folded: the mapped dimension moves to the front, and
what is not mapped is expanded without a copy or left to broadcast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.torch_gated_attn


def _lead(tensor: Tensor | None, dim: int | None, batch: int, rank: int) -> Tensor | None:
    """[batch, 1, ..., 1, *shape] of rank `rank`: right-aligned broadcasting then meets the mapped dimension."""
    if tensor is None:
        return None
    front = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return front[(slice(None),) + (None,) * (rank - front.dim())]


# of is_causal, window and key_lengths: the dispatcher leaves trailing defaults out
_DEFAULTS = (False, None, None)


def _complete(args: tuple[Any, ...], in_dims: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """All `count` arguments and their mapped dimensions."""
    missing = count - len(args)
    return (*args, *_DEFAULTS[len(_DEFAULTS) - missing :]), (*in_dims, *(None,) * missing)


def _forward(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
    args, dims = _complete(given, in_dims, 11)
    query, lengths = args[0], args[10]
    batch, rank = info.batch_size, query.dim() + (dims[0] is None)
    tensors = [_lead(x, d, batch, rank) for x, d in zip(args[:3], dims, strict=False)]
    tensors += [x if d is None else _lead(x, d, batch, rank) for x, d in zip(args[3:6], dims[3:6], strict=True)]
    results = _ops._gated_attention_forward(*tensors, *args[6:10], _lead(lengths, dims[10], batch, rank - 3))
    return results, (0, 0, 0, 0)


def _backward(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
    args, dims = _complete(given, in_dims, 17)
    tensors, lengths = args[:11], args[16]
    query = tensors[2]
    batch, rank = info.batch_size, query.dim() + (dims[2] is None)
    lead = []
    for i, (x, d) in enumerate(zip(tensors, dims, strict=False)):
        rows = i in (1, 9, 10)  # grad_lse, row_max, row_sum have no last dimension
        lead.append(_lead(x, d, batch, rank - rows))
    grads = _ops._gated_attention_backward(*lead, *args[11:16], _lead(lengths, dims[16], batch, rank - 3))
    # A gradient has its input's shape: the dimensions that _lead put in for alignment go again.
    inputs = [x if d is None or x is None else x.movedim(d, 0)[0] for x, d in zip(tensors[2:7], dims[2:7], strict=True)]
    shaped = tuple(g if g is None else g.reshape(batch, *x.shape) for g, x in zip(grads, inputs, strict=True))
    return shaped, tuple(None if g is None else 0 for g in shaped)


def _gate_output(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    rank = args[0].dim() + (in_dims[0] is None)
    return _ops.gate_output(*(_lead(x, d, info.batch_size, rank) for x, d in zip(args, in_dims, strict=True))), 0


def _gate_output_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    grad, out, gate, grad_mask = args
    rank = out.dim() + (in_dims[1] is None)
    lead = [_lead(x, d, info.batch_size, rank) for x, d in zip((grad, out, gate), in_dims, strict=False)]
    d_out, d_gate = _ops._gate_output_backward(*lead, grad_mask)
    unmapped = gate if in_dims[2] is None else gate.movedim(in_dims[2], 0)[0]
    d_gate = None if d_gate is None else d_gate.reshape(info.batch_size, *unmapped.shape)
    return (d_out, d_gate), tuple(None if x is None else 0 for x in (d_out, d_gate))


def register() -> None:
    """Register the rules; called once, when the package is imported."""
    torch.library.register_vmap("torch_gated_attn::_gated_attention_forward", _forward)
    torch.library.register_vmap("torch_gated_attn::_gated_attention_backward", _backward)
    torch.library.register_vmap("torch_gated_attn::gate_output", _gate_output)
    torch.library.register_vmap("torch_gated_attn::_gate_output_backward", _gate_output_backward)
