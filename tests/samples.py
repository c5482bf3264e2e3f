# SPDX-License-Identifier: BSD-3-Clause
"""Calls that between them have every argument present and absent, every dtype and every kind of memory layout."""

from __future__ import annotations

import itertools

import torch
from inputs import Inputs, draw
from torch import Tensor

INT32 = torch.tensor([[0, 3], [11, 12]], dtype=torch.int32)
SAMPLES: dict[str, dict[str, object]] = {
    "plain": {"gate": None, "bias": None, "mask": None},
    "everything": {"mask": "full"},
    "gate only": {"bias": None, "mask": None, "gate": "head"},
    "mask only": {"gate": None, "bias": None},
    "shared bias": {"batch": (3,), "bias": (1, 2, 9, 11)},
    "multi-query": {"heads": 4, "kv_heads": 1},
    "two batch dimensions": {"batch": (2, 3), "bias": (2, 1, 2, 9, 11)},
    "no batch dimension": {"batch": (), "bias": (11,), "gate": "head"},
    "mean": {"masked_rows": "mean", "scale": 0.3},
    "Dv": {"dv": 5},
    "causal": {"is_causal": True, "gate": None, "bias": None, "mask": None},
    "window, more queries than keys": {"is_causal": True, "window": 3, "q": 14, "heads": 4, "kv_heads": 2},
    "key lengths": {"key_lengths": [11, 4], "mask": None, "masked_rows": "mean"},
    "all of them, int32": {"batch": (2, 2), "is_causal": True, "window": 5, "key_lengths": INT32},
    "no keys": {"k": 0},
    "permuted": {"layout": "heads inside"},
    "permuted, bfloat16": {"layout": "heads inside", "dtype": torch.bfloat16},
    "transposed, float16": {"layout": "transposed", "dtype": torch.float16, "mask": "full"},
    "expanded": {"layout": "expanded", "gate": None},
    "bfloat16": {"dtype": torch.bfloat16, "bias_dtype": torch.float32},
    "float16": {"dtype": torch.float16, "kv_heads": 1},
    "float64": {"dtype": torch.float64},
}


def draw_sample(name: str, device: str) -> Inputs:
    sizes = {"seed": 1, "device": device, **SAMPLES[name]}
    layout = sizes.pop("layout", None)
    inputs = draw(**sizes)
    if layout == "heads inside":
        return inputs.map(lambda x: in_memory_as(x, (-2, -3), x.dim() - 1))
    if layout == "transposed":
        return inputs.map(lambda x: in_memory_as(x, (-1, -2), x.dim()))
    if layout == "expanded":
        return inputs.replace(query=inputs.query[..., :1, :].expand_as(inputs.query))
    return inputs


def in_memory_as(x: Tensor, swapped: tuple[int, int], rank: int) -> Tensor:
    """The same values with two dimensions swapped in memory; tensors that have fewer than `rank`, as lse, stay."""
    return x.transpose(*swapped).contiguous().transpose(*swapped) if rank >= 3 else x


def memory_orders(x: Tensor) -> list[Tensor]:
    """`x` in every order of its dimensions in memory, and with a stride of 0."""
    orders = itertools.permutations(range(x.dim()))
    permuted = [x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())]) for order in orders]
    return [*permuted, x[..., :1, :].expand_as(x)]


def strides(x: Tensor) -> list[int]:
    """Strides, where they say anything: not of dimensions of size 1 or of empty tensors."""
    return [x.stride(d) for d in range(x.dim()) if x.size(d) > 1] if x.numel() else []
