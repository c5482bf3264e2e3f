# SPDX-License-Identifier: BSD-3-Clause
"""AlphaFold's parameters as tensors: which arrays a module has, their shapes, and the layout of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ATTENTION", "ATTENTION_SHAPES", "as_tensor", "load", "match"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Haiku's names of the arrays of one `Attention` module behind those of our parameters.
ATTENTION = {
    "linear_q.weight": "query_w",
    "linear_k.weight": "key_w",
    "linear_v.weight": "value_w",
    "linear_g.weight": "gating_w",
    "linear_g.bias": "gating_b",
    "linear_o.weight": "output_w",
    "linear_o.bias": "output_b",
}
# A letter is a size: A and M inputs, H heads, D and V of a head, O outputs.
ATTENTION_SHAPES = {
    "query_w": "AHD",
    "value_w": "MHV",
    "output_b": "O",
    "key_w": "MHD",
    "gating_w": "AHV",
    "gating_b": "HV",
    "output_w": "HVO",
}


def as_tensor(name: str, array: Any) -> Tensor:
    """A tensor of the same numbers; what is no array of floating-point numbers is refused by its name."""
    if isinstance(array, Tensor):
        if array.dtype in _DTYPES:
            return array.detach()
        raise _refusal(name, str(array.dtype).removeprefix("torch."))
    import numpy

    try:
        values = numpy.asarray(array)
    except ValueError as error:  # lists of unequal lengths
        raise _refusal(name, f"a {type(array).__name__}") from error
    # A copy, for arrays of JAX are read-only, in this machine's byte order.
    if values.dtype.name == "bfloat16":  # of ml_dtypes, which torch.from_numpy does not know
        return torch.from_numpy(numpy.array(values, order="C").view(numpy.int16)).view(torch.bfloat16)
    if values.dtype.kind == "f" and values.dtype.itemsize <= 8:
        return torch.from_numpy(numpy.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
    raise _refusal(name, str(values.dtype))


def _refusal(name: str, kind: str) -> TypeError:
    return TypeError(f"{name} must be an array of float64, float32, bfloat16 or float16, but is {kind}")


def match(arrays: Mapping[str, Tensor], shapes: Mapping[str, str]) -> dict[str, int]:
    """The size behind each letter of `shapes`, by the first array that has it; every other array has to fit."""
    sizes: dict[str, int] = {}
    for name, letters in shapes.items():
        shape = list(arrays[name].shape)
        if len(shape) != len(letters):
            raise ValueError(f"{name} must have {len(letters)} dimension{'s' * (len(letters) > 1)}, but has shape {shape}")
    for name, letters in shapes.items():
        shape = list(arrays[name].shape)
        expected = [sizes.setdefault(letter, size) for letter, size in zip(letters, shape, strict=True)]
        if shape != expected:
            raise ValueError(f"{name} must have shape {expected} to fit the other arrays, but has shape {shape}")
    return sizes


def load(module: nn.Module, arrays: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Copy arrays into parameters; `names` has the array of each parameter."""
    with torch.no_grad():
        for parameter, name in names.items():
            target, values = module.get_parameter(parameter), _in_torch_layout(name, arrays[name])
            if values.shape != target.shape:
                shape = list(arrays[name].shape)
                raise ValueError(f"{name} must have the {target.numel()} elements of {parameter}, but has shape {shape}")
            target.copy_(values)


def _in_torch_layout(name: str, array: Tensor) -> Tensor:
    """Haiku keeps heads as a dimension and multiplies by a weight from the right."""
    if array.dim() == 1 or name.endswith("_b"):
        return array.flatten()
    return (array.flatten(0, -2) if name.endswith("output_w") else array.flatten(1)).T
