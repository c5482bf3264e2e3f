# SPDX-License-Identifier: BSD-3-Clause
"""Checks of what the operator's schema would convert in silence, or PyTorch refuse in its own words; the rest the operator
checks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["check_call", "check_tensor"]


def check_tensor(name: str, argument: Any, optional: bool = False) -> None:
    """Whether an argument is a tensor, or stands for one while a graph is traced."""
    if isinstance(argument, Tensor) or hasattr(argument, "__torch_function__") or (optional and argument is None):
        return
    kind = f"{type(argument).__module__}.{type(argument).__qualname__}".removeprefix("builtins.")
    came = "None" if argument is None else f"a {kind}"
    raise TypeError(f"{name} must be a torch.Tensor{' or None' if optional else ''}, but is {came}")


def check_call(query: Any, key: Any, value: Any, gate: Any, bias: Any, mask: Any, key_lengths: Any, scale: Any) -> None:
    """The arguments that all functions of attention share."""
    check_tensor("query", query)
    check_tensor("key", key)
    check_tensor("value", value)
    check_tensor("gate", gate, optional=True)
    check_tensor("bias", bias, optional=True)
    check_tensor("mask", mask, optional=True)
    check_tensor("key_lengths", key_lengths, optional=True)
    if isinstance(scale, Tensor):  # the schema takes one, and makes a number of it
        raise TypeError(
            "scale must be a number, but is a tensor, whose gradient would be lost: multiply query by it and pass scale=1.0"
        )
