# SPDX-License-Identifier: BSD-3-Clause
"""Additive mask biases as boolean masks.

Structure models hide padding by adding (mask - 1) * 1e9, or -inf, or the dtype's lowest number, to the logits. The operator
takes such a bias as a boolean mask: it is 2 to 8 times smaller, hidden keys cost nothing, a float bias of that size cannot
absorb the logits of a row, and no sum with the pair bias, as large as all the logits, is formed. Whether a bias is a mask
follows from its numbers, never from a guess: where they cannot be looked at, it is added, or the guess is asserted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._access import Access, access

__all__ = ["MASKING", "heads_first", "merge", "split", "zero_or_one"]

# A logit this low hides its key: exp(-1e4) is 0 in every dtype beside any logit above -9,000. The constants in use are 1e5
# and more, and float16's lowest number is -65,504.
MASKING = -1e4

_NO_MASK = "the mask bias must be 0 or at most -1e4 everywhere, but holds other numbers: add it to the pair bias beforehand"


def split(first: Tensor | None, pair: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """`first` + `pair`, biases that broadcast to [*, H, Q, K], as the mask and the bias of the operator.

    Args:
        first: may be a mask of the keys.
        dtype: of the query; the operator takes a bias of this dtype or float32.
    """
    mask = None if first is None else _as_mask(first, pair)
    bias = pair if mask is not None else _sum(first, pair)
    if bias is not None and bias.dtype not in (torch.float32, dtype):
        bias = bias.to(dtype)
    return mask, bias


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _as_mask(bias: Tensor, pair: Tensor | None) -> Tensor | None:
    """The keys that `bias` leaves visible, bool, or None if it is to be added.

    A mask is constant (does not require grad), the same for all heads and queries, [*, 1, 1, K], and 0 or at most `MASKING`
    everywhere. Where that can only be asserted, it is where a sum would be larger than `pair`.
    """
    may = access(bias)
    if bias.requires_grad or any(bias.size(d) != 1 for d in (-2, -3) if bias.dim() >= -d) or may is Access.NONE:
        return None
    if may is Access.ASSERT and not _enlarges(bias, pair):
        return None
    is_mask = ((bias == 0) | (bias <= MASKING)).all()  # False where bias is NaN
    if may is Access.ASSERT:
        torch._assert_async(is_mask, _NO_MASK)
    elif not bool(is_mask):
        return None
    return bias > MASKING


def _enlarges(bias: Tensor, pair: Tensor | None) -> bool:
    """Whether bias + pair has more elements than `pair`, or than `bias` if that is all."""
    if pair is None:
        return False
    missing = any(size != 1 for size in bias.shape[: max(bias.dim() - pair.dim(), 0)])
    return missing or any(a != 1 and b == 1 for a, b in zip(reversed(bias.shape), reversed(pair.shape), strict=False))


def merge(biases: Sequence[Tensor], logits: Sequence[int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A list of biases, as OpenFold's attention takes them, as one boolean mask and one differentiable bias.

    Args:
        biases: tensors that broadcast to [*, H, Q, K]; by convention the first is the mask, if any is.
        logits: H and Q. With H = Q = 1 a mask cannot be told from a pair bias, and none is looked for.
        dtype: of the query.
    """
    terms = list(biases)
    first = terms.pop(0) if terms and tuple(logits) != (1, 1) else None
    pair = None
    for term in terms:
        pair = _sum(pair, term)
    return split(first, pair, dtype)


def zero_or_one(mask: Tensor, pair: Tensor, inf: float, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """`pair` + (1 - mask) * -inf, where a mask of 1 attends, as the mask and the bias of the operator; `dtype` as above."""
    if mask.dtype == torch.bool:
        return mask, split(None, pair, dtype)[1]
    return split((1 - mask.float()) * -inf, pair, dtype)


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[*, L, H * D] -> [*, H, L, D], a view."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(-2, -3)
