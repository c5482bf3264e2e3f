# SPDX-License-Identifier: BSD-3-Clause
"""Additive mask biases as boolean masks.

Structure models hide padding by adding (mask - 1) * 1e9, or -inf, or the dtype's lowest number, to the logits. The operator
takes such a bias as a boolean mask: it is 2 to 8 times smaller, hidden keys cost nothing, and a float bias of that size
cannot absorb the logits of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["MASKING", "additive_mask", "heads_first", "merge", "zero_or_one"]

# A logit this low hides its key: exp(-1e4) is 0 in every dtype beside any logit above -9,000. The constants in use are 1e5
# and more, and float16's lowest number is -65,504.
MASKING = -1e4


def _readable(tensor: Tensor) -> bool:
    """Whether looking at the data is free: on a CUDA device it would wait for the queue, in a trace end the graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def additive_mask(bias: Tensor) -> Tensor | None:
    """The keys that `bias` leaves visible, bool, or None if it is not a mask.

    A mask is constant (does not require grad) and the same for all heads and queries, [*, 1, 1, K]. That its values are 0
    or at most `MASKING` is verified on a CPU; elsewhere reading them would wait for the device, so the shape decides.
    """
    if bias.requires_grad or any(bias.size(d) != 1 for d in (-2, -3) if bias.dim() >= -d):
        return None
    visible = bias > MASKING
    if _readable(bias) and not bool(((bias == 0) == visible).all()):
        return None
    return visible


def zero_or_one(mask: Tensor) -> Tensor | None:
    """A mask of 0 and 1 as bool; None if it holds anything else, which is looked at on a CPU only (see `additive_mask`)."""
    visible = mask.bool()
    if mask.dtype != torch.bool and _readable(mask) and not bool((visible == mask).all()):
        return None
    return visible


def merge(biases: Sequence[Tensor], logits: Sequence[int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A list of biases, as OpenFold's attention takes them, as one boolean mask and one differentiable bias.

    Args:
        biases: tensors that broadcast to [*, H, Q, K]; by convention the first is the mask, if any is.
        logits: H and Q. With H = Q = 1 a mask cannot be told from a pair bias, and none is looked for.
        dtype: of the query; the operator takes a bias of this dtype or float32.
    """
    mask, rest = None, list(biases)
    if rest and tuple(logits) != (1, 1):
        mask = additive_mask(rest[0])
        rest = rest[mask is not None :]
    bias = None
    for term in rest:
        bias = term if bias is None else bias + term
    if bias is not None and bias.dtype not in (torch.float32, dtype):
        bias = bias.to(dtype)
    return mask, bias


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[*, L, H * D] -> [*, H, L, D], a view."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(-2, -3)
