# SPDX-License-Identifier: BSD-3-Clause
"""What local queries see of one shard of the keys, in arguments of the operator, which knows of that shard only."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ._call import Call, Places


@dataclasses.dataclass(frozen=True)
class Shard:
    """Arguments of the operator for keys begin to end of all keys."""

    begin: int
    end: int
    mask: Tensor | None
    is_causal: bool
    window: int | None
    key_lengths: Tensor | None

    @property
    def visibility(self) -> tuple[Any, ...]:
        return self.is_causal, self.window, self.key_lengths


def columns(tensor: Tensor | None, begin: int, end: int) -> Tensor | None:
    """Those keys of a bias or mask, unless it is the same for all keys."""
    return tensor if tensor is None or tensor.dim() == 0 or tensor.shape[-1] == 1 else tensor[..., begin:end]


def visible(call: Call, mask: Tensor | None, places: Places, source: int) -> Shard | None:
    """The shard of `source`, `mask` being its columns; None if no query of this process sees any of its keys."""
    begin, end = places.key_range(source)
    queries, keys = call.query.shape[-2], end - begin
    if queries == 0 or keys == 0:
        return None
    lengths = None if call.key_lengths is None else (call.key_lengths - begin).clamp(0, keys)
    if not call.is_causal:
        return Shard(begin, end, mask, False, None, lengths)
    first, window = places.shift(source), call.window
    last = first + queries - 1
    if last < 0 or (window is not None and first - window >= keys - 1):
        return None
    if first >= keys - 1 and (window is None or last - window < 0):  # every query sees every key
        return Shard(begin, end, mask, False, None, lengths)
    if last == keys - 1:  # the operator would place the queries there itself
        return Shard(begin, end, mask, True, window, lengths)
    return Shard(begin, end, _and(mask, _near(first, queries, keys, window, call.query.device)), False, None, lengths)


def _near(first: int, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[Q, K]: key j is at or before query i, which stands at first + i, and within its window."""
    position = torch.arange(first, first + queries, device=device).unsqueeze(-1)
    key = torch.arange(keys, device=device)
    near = key <= position
    return near if window is None else near & (key > position - window)


def _and(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other
