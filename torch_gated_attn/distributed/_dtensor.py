# SPDX-License-Identifier: BSD-3-Clause
"""DTensor arguments of the operators whose keys are spread: the placement of `key` says the group.

Only public API: to_local with the placements of the gradients, from_local with the global shape and strides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a call is spread: the mesh dimension over which keys are split, and the dimension of [*, H, Q, K] that each of
    the other mesh dimensions splits, or None."""

    over: int
    dims: tuple[int | None, ...]
    rank: int
    queries_are_split: bool

    def placements(self, name: str, tensor: DTensor) -> tuple[list[Placement], list[Placement]]:
        """Of an argument and of its gradient."""
        own, grads = [], []
        for m, dim in enumerate(self.dims):
            placement, complete = self._one(name, tensor, m, dim)
            own.append(placement)
            grads.append(placement if complete or placement != Replicate() else Partial())
        return own, grads

    def _one(self, name: str, tensor: DTensor, m: int, dim: int | None) -> tuple[Placement, bool]:
        """The placement on mesh dimension m, and whether a whole argument has its whole gradient there."""
        keys = name in ("key", "value")
        if m == self.over:
            if keys:
                return Shard(self.rank - 2), True
            if self.queries_are_split:
                return self._aligned(name, tensor, self.rank - 2), False
            columns = name in ("bias", "mask")
            return self._aligned(name, tensor, self.rank - 1 if columns else None), not columns
        if dim is None or (keys and dim == self.rank - 2):
            return Replicate(), dim is None
        return self._aligned(name, tensor, dim), False

    def _aligned(self, name: str, tensor: DTensor, dim: int | None) -> Placement:
        """Right-aligned with [*, H, Q, K]; key_lengths are [*]."""
        missing = 0 if name == "key_lengths" else self.rank - tensor.ndim
        own = -1 if dim is None else dim - missing
        return Shard(own) if 0 <= own < tensor.ndim and tensor.shape[own] != 1 else Replicate()


def layout_of(query: DTensor, key: DTensor, queries_are_split: bool) -> Layout:
    rank = query.ndim
    over = [m for m, p in enumerate(key.placements) if p == Shard(rank - 2)]
    if len(over) != 1:
        raise ValueError(
            f"key must be split over its positions, Shard({rank - 2}), on one mesh dimension, "
            f"but has placements {key.placements}"
        )
    dims: list[int | None] = []
    for m, p in enumerate(query.placements):
        splits = isinstance(p, Shard) and p.dim < rank - 1 and query.shape[p.dim] != 1 and m != over[0]
        dims.append(cast(Shard, p).dim if splits else None)
    layout = Layout(over[0], tuple(dims), rank, queries_are_split)
    heads, parts = key.shape[rank - 3], 1
    for m, dim in enumerate(dims):
        parts *= query.device_mesh.size(m) if dim == rank - 3 else 1
    if heads not in (1, query.shape[rank - 3]) and heads % parts != 0:
        raise ValueError(f"key must have heads divisible by the {parts} parts of query's heads, but has {heads}")
    return layout


def chunk_sizes(size: int, parts: int) -> list[int]:
    """Of the shards of a DTensor."""
    most = -(-size // parts)
    return [max(0, min(most, size - part * most)) for part in range(parts)]


def attend(
    function: Attend, arguments: dict[str, Any], queries_are_split: bool, options: dict[str, Any]
) -> tuple[DTensor, DTensor]:
    """`function` on the local parts of `arguments`; out and lse as DTensors."""
    query, key = arguments["query"], arguments["key"]
    for name, tensor in arguments.items():
        if tensor is not None and not isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a DTensor, as other arguments are, but is a {type(tensor).__name__}")
    layout = layout_of(query, key, queries_are_split)
    mesh, parts = query.device_mesh, query.device_mesh.size(layout.over)
    if options["is_causal"] and layout.rank - 2 in layout.dims:
        raise ValueError(
            f"is_causal needs query's positions split over mesh dimension {layout.over} alone, as key's, "
            f"but query has placements {query.placements}"
        )
    local = {}
    for name, tensor in arguments.items():
        if tensor is not None:
            own, grads = layout.placements(name, tensor)
            # Redistributing to the same placements would reduce a Partial gradient.
            here = tensor if list(tensor.placements) == own else tensor.redistribute(placements=own)
            local[name] = here.to_local(grad_placements=grads)
    sizes = {"key_sizes": chunk_sizes(key.shape[-2], parts)}
    if queries_are_split:
        sizes["query_sizes"] = chunk_sizes(query.shape[-2], parts)
    out, lse = function(**local, group=mesh.get_group(layout.over), **sizes, **options)
    placements = layout.placements("query", query)[0]

    def spread(part: Tensor, last: tuple[int, ...], like: Tensor | None) -> DTensor:
        shape = torch.Size((*query.shape[:-1], *last))
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=_strides(shape, like))

    return spread(out, (arguments["value"].shape[-1],), query), spread(lse, (), None)


def _strides(shape: Sequence[int], like: Tensor | None) -> tuple[int, ...]:
    """Dense, the dimensions in memory as those of `like`, as the operator promises for out."""
    order = sorted(range(len(shape)), key=lambda d: 0 if like is None else -like.stride()[d])
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d], step = step, step * shape[d]
    return tuple(strides)
