# SPDX-License-Identifier: BSD-3-Clause
"""Masks that follow from positions: causal, sliding window, key lengths."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["both", "check_structure", "structure_mask"]


def check_structure(query: Tensor, is_causal: bool, window: int | None, key_lengths: Tensor | None) -> None:
    if window is not None and not is_causal:
        raise ValueError(f"window must be None without is_causal, but is {window}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, but is {window}")
    if key_lengths is None:
        return
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths must be int32 or int64, but is {key_lengths.dtype}")
    if key_lengths.shape != query.shape[:-3]:
        raise ValueError(
            f"key_lengths must have query's batch dimensions {list(query.shape[:-3])}, "
            f"but has shape {list(key_lengths.shape)}"
        )


def structure_mask(
    queries: int,
    keys: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor | None:
    r"""The smallest boolean mask, True = attend, that broadcasts to [\*, H, Q, K] and says the same.

    Query i stands at key position p = K - Q + i, so the last query sees the last key (bottom-right alignment). It attends
    to the keys j <= p if `is_causal`, of those to the last `window`, j > p - window, and always to j < key_lengths.

    Args:
        queries, keys: Q and K.
        is_causal: hide later keys.
        window: number of keys a query sees, itself included; needs `is_causal`.
        key_lengths: [\*], number of keys that exist in each batch entry.
        device: of the result.

    Returns:
        [Q, K], or [\*, 1, 1, K] for key lengths alone, or [\*, 1, Q, K]; None if nothing is hidden.
    """
    key = torch.arange(keys, device=device)
    mask = None
    sees_all = queries == 1 and (window is None or window >= keys)  # the last query does
    if is_causal and not sees_all:
        position = torch.arange(keys - queries, keys, device=device)[:, None]
        mask = key <= position
        if window is not None:
            mask = mask & (key > position - window)
    if key_lengths is not None:
        exists = key < key_lengths[..., None, None, None]
        mask = exists if mask is None else mask & exists
    return mask


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The keys that two masks leave visible; None is a mask that hides nothing."""
    if a is None or b is None:
        return b if a is None else a
    return a & b
