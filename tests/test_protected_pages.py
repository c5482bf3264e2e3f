# SPDX-License-Identifier: BSD-3-Clause
"""Nothing is read outside the inputs: each starts right after, or ends right before, a page that must not be touched.

What is written, and that outputs touch such pages too, is in test_core.py, where the test owns the outputs' memory.
"""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from inputs import DTYPES, Inputs, draw
from mapped import exit_code_of, guarded
from torch import Tensor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mmap")

OPS = torch.ops.torch_gated_attn
# Few queries, one and two vectors of them, sizes that end in the middle of every vector, columns of one element.
SIZES = [
    {"q": 1, "k": 5, "d": 7, "dv": 3},
    {"q": 9, "k": 13, "d": 7, "dv": 5},
    {"q": 37, "k": 35, "d": 24, "dv": 17},
    {"q": 3, "k": 33, "d": 40, "dv": 1},
]
VARIANTS = [
    {"mask": "full", "bias": "full"},
    {"mask": "key", "bias": (3, 1, 1), "gate": "head"},
    {"heads": 2, "kv_heads": 1},
]


def results(inputs: Inputs, place) -> list[Tensor]:
    """Results of the forward and, from them, of the backward, every argument passed through `place`."""
    tensors = [None if x is None else place(x) for x in inputs.tensors]
    options = (inputs.scale, inputs.masked_rows)
    out, lse, row_max, row_sum = OPS._gated_attention_forward(*tensors, *options)
    given = [place(x) for x in (inputs.grad_out, inputs.grad_lse)]
    saved = [place(x) for x in (out, row_max, row_sum)]
    wanted = [True, True, True, inputs.gate is not None, inputs.bias is not None]
    return [out, lse, *OPS._gated_attention_backward(*given, *tensors, *saved, *options, wanted)]


def in_rows_of_heads(place):
    """[.., H, L, D] as a view of [.., L, H, D]."""
    return lambda x: place(x.transpose(-2, -3).contiguous()).transpose(-2, -3) if x.dim() > 3 else place(x)


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_beside_protected_pages(dtype, side):
    calls = [
        draw(**{"seed": i, "dtype": dtype, "batch": (2,), "heads": 3, **sizes, **variant})
        for i, (sizes, variant) in enumerate((s, v) for s in SIZES for v in VARIANTS)
    ]
    expected = [results(call, lambda x: x) for call in calls]

    def beside() -> None:
        for call, right in zip(calls, expected, strict=True):
            for layout in (lambda place: place, in_rows_of_heads):
                found = results(call, layout(lambda x: guarded(x, side)))
                for a, b in zip(found, right, strict=True):
                    assert a is b is None or torch.equal(a, b)

    assert exit_code_of(beside) == 0


@pytest.mark.parametrize(("side", "index"), [("before", -1), ("after", 8)])
def test_the_pages_are_protected(side, index):
    """One element beside the tensor ends the process."""
    x = guarded(torch.zeros(8), side)
    neighbour = x.data_ptr() + index * x.element_size()
    assert exit_code_of(lambda: ctypes.string_at(neighbour, 1)) < 0
