# SPDX-License-Identifier: BSD-3-Clause
"""Registers ring and split-key attention as operators, with derivative, fake and autocast rules: torch.compile keeps them
whole, and checkpointing, hooks and torch.library.opcheck know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup
from torch.library import Library, register_autograd, register_fake

from . import _ring, _split
from ._call import ARGUMENTS, INPUTS, KEY_LENGTHS, SCHEMA, TENSORS, Call
from ._gradients import Gradients, Residuals
from ._merge import Results

_library: Any = Library("torch_gated_attn", "FRAGMENT")  # type: ignore[no-untyped-call]
_ops = torch.ops.torch_gated_attn
_TAG = torch.Tag.pt2_compliant_tag

_BACKWARD_SCHEMA = (
    "Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor row_max, Tensor row_sum, bool[5] grad_mask, " + SCHEMA
)
_BACKWARD_FIRST = 6  # arguments before those of SCHEMA


def _register(name: str, forward: Callable[[Call], Results], backward: Callable[..., Gradients]) -> None:
    """`name` and `name`_backward."""
    _library.define(f"{name}({SCHEMA}) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)", tags=_TAG)
    _library.define(f"{name}_backward({_BACKWARD_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags=_TAG)

    def run_backward(*args: Any) -> Gradients:
        *residuals, wanted = args[:_BACKWARD_FIRST]
        return backward(Call(*args[_BACKWARD_FIRST:]), Residuals(*residuals), wanted)

    _library.impl(name, lambda *args: forward(Call(*args)), "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", run_backward, "CompositeExplicitAutograd")
    register_fake(f"torch_gated_attn::{name}", _fake_forward, lib=_library)
    register_fake(f"torch_gated_attn::{name}_backward", _fake_backward, lib=_library)
    _register_derivative(name)
    for device in ("cpu", "cuda"):
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
        _library.impl(name, _autocast(getattr(_ops, name).default, device, key), key.name)


def _fake_forward(*args: Any) -> Results:
    query, key, value = args[:3]
    results: Results = _ops._gated_attention_forward(query, key, value, None, None, None, None, "zero")
    return results


def _fake_backward(*args: Any) -> Gradients:
    wanted, inputs = args[_BACKWARD_FIRST - 1], args[_BACKWARD_FIRST : _BACKWARD_FIRST + 5]
    grads = [torch.empty_like(t) if w and t is not None else None for t, w in zip(inputs, wanted, strict=True)]
    if grads[4] is not None:
        grads[4] = grads[4].contiguous()
    return tuple(grads)


def _register_derivative(name: str) -> None:
    derive = getattr(_ops, f"{name}_backward").default

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        out, _, row_max, row_sum = output
        ctx.save_for_backward(out, row_max, row_sum, *inputs[:TENSORS], inputs[KEY_LENGTHS])
        ctx.before, ctx.after = inputs[TENSORS:KEY_LENGTHS], inputs[KEY_LENGTHS + 1 :]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        absent = (None,) * (INPUTS - 5)
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None, *absent
        *saved, lengths = ctx.saved_tensors
        residuals, tensors = saved[:3], saved[3:]
        wanted = list(ctx.needs_input_grad[:5])
        arguments = (*tensors, *ctx.before, lengths, *ctx.after)
        return *derive(grad_out, grad_lse, *residuals, wanted, *arguments), *absent

    def refuse(*_: Any) -> None:  # else autograd would take the gradients for constants, with no more than a warning
        raise NotImplementedError(f"{name[1:]} cannot be differentiated twice")

    register_autograd(f"torch_gated_attn::{name}", backward, setup_context=setup, lib=_library)
    register_autograd(f"torch_gated_attn::{name}_backward", refuse, lib=_library)


def _autocast(op: Any, device: str, key: torch._C.DispatchKey) -> Callable[..., Results]:
    """The operator's rule (csrc/autocast.cpp): a float32 bias keeps its precision, float64 calls are left alone."""

    def run(*args: Any) -> Results:
        query, key_, value, gate, bias, *rest = args
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            if query.dtype == torch.float64:
                return op(*args)  # type: ignore[no-any-return]
            low = torch.get_autocast_dtype(device)
            cast = [None if t is None else t.to(low) for t in (query, key_, value, gate)]
            if bias is not None and bias.dtype != torch.float32:
                bias = bias.to(torch.float32 if bias.dtype == torch.float64 else low)
            return op(*cast, bias, *rest)  # type: ignore[no-any-return]

    return run


_register("_ring_gated_attention", _ring.forward, _ring.backward)
_register("_split_key_attention", _split.forward, _split.backward)


def caller(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator with arguments by name, and a group in the place of its name."""
    op = getattr(_ops, name).default

    def call(*, group: ProcessGroup, **arguments: Any) -> tuple[Tensor, Tensor]:
        arguments["group_name"] = group.group_name
        out, lse, _, _ = op(*(arguments.get(name) for name in ARGUMENTS))
        return out, lse

    return call
