# SPDX-License-Identifier: BSD-3-Clause
r"""ONNX export: the operators as standard ONNX operators (opset 18), which every ONNX runtime has.

.. code-block:: python

    import torch_gated_attn.onnx

    program = torch.onnx.export(
        model, args, dynamo=True, custom_translation_table=torch_gated_attn.onnx.TRANSLATION_TABLE
    )

The graph computes what :mod:`torch_gated_attn.reference` does, in float32 (float64 for float64), and allocates
[\*, H, Q, K]. Batch and sequence lengths may be dynamic; numbers of heads and head_dim may not. There must be at least
one key, and a NaN in a masked key is not ignored.

Needs onnxscript, which is imported with this module only: ``pip install "torch-gated-attn[onnx]"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

try:
    from onnxscript import ir
    from onnxscript import opset18 as op
except ImportError as error:
    raise ImportError('torch_gated_attn.onnx needs onnxscript: pip install "torch-gated-attn[onnx]"') from error

__all__ = ["TRANSLATION_TABLE"]

_LAST, _ROWS, _HEADS = -1, -2, -3


def _static(name: str, size: Any) -> int:
    if not isinstance(size, int):
        raise ValueError(f"{name} must be the same in every call of an ONNX graph, but is dynamic: {size}")
    return size


def _repeat_heads(x: Any, heads: int) -> Any:
    """[*, Hkv, K, C] -> [*, H, K, C]; `x` must be an argument of the call, as only those know their shape."""
    kv_heads = _static("the number of key heads", x.shape[_HEADS])
    if kv_heads == heads:
        return x
    copies = [1] * (len(x.shape) + 1)
    copies[_HEADS] = heads // kv_heads
    groups = op.Expand(op.Unsqueeze(x, [_HEADS]), copies)  # [*, Hkv, H / Hkv, K, C]
    shape = op.Concat(op.Shape(x, end=_HEADS), op.Constant(value_ints=[heads]), op.Shape(x, start=_ROWS), axis=0)
    return op.Reshape(groups, shape)


def _hidden(query: Any, key: Any, is_causal: bool, window: int | None, key_lengths: Any) -> Iterator[Any]:
    """Bool values that broadcast to [*, H, Q, K], True = the key is not seen; query i stands at key position K - Q + i."""

    def scalar(x: int) -> Any:
        return op.Constant(value=ir.tensor(x, dtype=ir.DataType.INT64))

    def length(x: Any) -> Any:
        return op.Squeeze(op.Shape(x, start=_ROWS, end=_LAST), [0])

    keys = length(key)
    position = op.Range(scalar(0), keys, scalar(1))  # [K]
    if is_causal:
        own = op.Unsqueeze(op.Range(op.Sub(keys, length(query)), keys, scalar(1)), [_LAST])  # [Q, 1]
        yield op.Greater(position, own)
        if window is not None:
            yield op.LessOrEqual(position, op.Sub(own, scalar(window)))
    if key_lengths is not None:
        lengths = op.Unsqueeze(op.Cast(key_lengths, to=ir.DataType.INT64), [-1, -2, -3])
        yield op.GreaterOrEqual(position, lengths)


def _gate_output(out: Any, gate: Any) -> Any:
    dtype = out.dtype
    wide = dtype if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    return op.Cast(op.Mul(op.Cast(out, to=wide), op.Sigmoid(op.Cast(gate, to=wide))), to=dtype)


def _attend(
    query: Any,
    key: Any,
    value: Any,
    gate: Any = None,
    bias: Any = None,
    mask: Any = None,
    scale: float | None = None,
    masked_rows: str = "zero",
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Any = None,
) -> tuple[Any, Any]:
    """out and lse as ONNX values; arguments as those of :func:`torch_gated_attn.gated_attention_with_lse`."""
    dtype = query.dtype
    wide = dtype if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    heads = _static("the number of heads", query.shape[_HEADS])
    head_dim = _static("head_dim", query.shape[_LAST])
    if scale is None:
        scale = head_dim**-0.5 if head_dim > 0 else 1.0

    *batch, rows, last = range(len(query.shape))

    def number(x: float) -> Any:  # in the type of the others: Python's own would be float32
        return op.Constant(value=ir.tensor(x, dtype=wide))

    query = op.Cast(query, to=wide)
    key, value = (op.Cast(_repeat_heads(x, heads), to=wide) for x in (key, value))
    logits = op.Mul(op.MatMul(query, op.Transpose(key, perm=[*batch, last, rows])), number(scale))  # [*, H, Q, K]
    if bias is not None:
        logits = op.Add(logits, op.Cast(bias, to=wide))
    if mask is not None:
        logits = op.Where(mask, logits, number(-math.inf))
    for hidden in _hidden(query, key, is_causal, window, key_lengths):
        logits = op.Where(hidden, number(-math.inf), logits)

    # As in the reference: a row that attends to nothing gets finite logits, and its result afterwards.
    dead = op.Equal(op.ReduceMax(logits, [_LAST], keepdims=1), number(-math.inf))  # [*, H, Q, 1]
    logits = op.Where(dead, number(0.0), logits)
    attended = op.MatMul(op.Softmax(logits, axis=_LAST), value)
    result_if_dead = op.ReduceMean(value, [_ROWS], keepdims=1) if masked_rows == "mean" else number(0.0)
    out = op.Where(dead, result_if_dead, attended)
    if gate is not None:
        out = op.Mul(out, op.Sigmoid(op.Cast(gate, to=wide)))
    lse = op.Where(dead, number(-math.inf), op.ReduceLogSumExp(logits, [_LAST], keepdims=1))
    return op.Cast(out, to=dtype), op.Squeeze(lse, [_LAST])


def _gated_attention(*args: Any, **options: Any) -> Any:
    return _attend(*args, **options)[0]


#: For ``custom_translation_table`` of ``torch.onnx.export``.
TRANSLATION_TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.torch_gated_attn.gated_attention.default: _gated_attention,
    torch.ops.torch_gated_attn.gated_attention_with_lse.default: _attend,
    torch.ops.torch_gated_attn.gate_output.default: _gate_output,
}
