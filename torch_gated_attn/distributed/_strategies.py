# SPDX-License-Identifier: BSD-3-Clause
"""Which placements DTensor may give the arguments and results of the functional operators, for one mesh dimension.

It may split a batch dimension, the heads or the queries of the [*, H, Q, K] logits. What is broadcast over the split
dimension stays whole, and its gradient is Partial. Keys cannot be split here: that is a ring.

Arguments come as DTensor's specs, which have the tensors' shape and mesh; absent ones as None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

Acceptable = list[tuple[list[Placement | None], list[Placement | None]]]  # (results, arguments), for each split

WHOLE = Replicate()


def aligned(tensor: Any, dim: int | None, rank: int) -> Placement | None:
    """Placement of a tensor that broadcasts, right-aligned, to `rank` dimensions of which `dim` is split."""
    if tensor is None:
        return None
    own = -1 if dim is None else dim - (rank - tensor.ndim)
    return Shard(own) if own >= 0 and tensor.shape[own] != 1 else WHOLE


def gradient(placement: Placement | None, split: bool = True) -> Placement | None:
    """Placement of the gradient of an argument: every process has its share of what is whole where others are split."""
    return Partial() if split and placement == WHOLE else placement


def _parts_have_whole_groups(heads: int, mesh: Any) -> bool:
    """Whichever mesh dimensions split the key/value heads. More parts than heads are refused by DTensor itself."""
    parts = [math.prod(sizes) for n in range(mesh.ndim + 1) for sizes in itertools.combinations(mesh.shape, n)]
    return all(heads % p == 0 for p in parts if p <= heads)


def _splits(query: Any, key: Any, value: Any, others: Sequence[Any], is_causal: bool) -> list[tuple[int | None, Placement]]:
    """The dimensions of [*, H, Q, K] that may be split, and the placement of key and value; None: nothing is split.

    DTensor weighs every combination over the mesh dimensions, which takes seconds for three of them, so dimensions that
    nothing splits are offered only where what is split cannot stay.
    """
    possible = dict(_possible_splits(query, key, is_causal))
    split = {dim for t in (query, *others) for dim in _split_dims(t, query.ndim)}
    for t in (key, value):  # [*, H, K, D]
        split |= {dim + (dim == query.ndim - 2) for dim in _split_dims(t, query.ndim)}
    offered = split if split <= possible.keys() else possible.keys()
    return [(None, WHOLE), *((dim, kv) for dim, kv in possible.items() if dim in offered)]


def _split_dims(tensor: Any, rank: int) -> list[int]:
    """Right-aligned with `rank` dimensions."""
    return [] if tensor is None else [p.dim + rank - tensor.ndim for p in tensor.placements if hasattr(p, "dim")]


def _possible_splits(query: Any, key: Any, is_causal: bool) -> Iterator[tuple[int, Placement]]:
    heads, queries = query.ndim - 3, query.ndim - 2
    for dim in range(queries + 1):
        if query.shape[dim] == 1:
            continue
        if dim == queries:
            # Every query needs every key. The operator counts positions from the last query of a call, so part of the
            # queries would see too few keys.
            if not is_causal:
                yield dim, WHOLE
        elif dim != heads or key.shape[heads] == query.shape[heads]:
            yield dim, Shard(dim)
        elif key.shape[heads] == 1:
            yield dim, WHOLE
        elif _parts_have_whole_groups(key.shape[heads], query.mesh):
            yield dim, Shard(dim)


def _lengths(key_lengths: Any, dim: int | None) -> Placement | None:
    """Of [*]: one length for each batch entry."""
    if key_lengths is None:
        return None
    return Shard(dim) if dim is not None and dim < key_lengths.ndim else WHOLE


def _own(dim: int | None) -> Placement:
    return WHOLE if dim is None else Shard(dim)


def forward(
    query: Any,
    key: Any,
    value: Any,
    gate: Any,
    bias: Any,
    mask: Any,
    scale: float | None,
    masked_rows: str,
    is_causal: bool = False,  # the dispatcher leaves trailing defaults out
    window: int | None = None,
    key_lengths: Any = None,
) -> Acceptable:
    result: Acceptable = []
    for dim, kv in _splits(query, key, value, (gate, bias, mask), is_causal):
        own, others = _own(dim), [aligned(t, dim, query.ndim) for t in (gate, bias, mask)]
        result.append(([own] * 4, [own, kv, kv, *others, None, None, None, None, _lengths(key_lengths, dim)]))
    return result


def backward(
    grad_out: Any,
    grad_lse: Any,
    query: Any,
    key: Any,
    value: Any,
    gate: Any,
    bias: Any,
    mask: Any,
    out: Any,
    row_max: Any,
    row_sum: Any,
    scale: float | None,
    masked_rows: str,
    grad_mask: Sequence[bool],
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Any = None,
) -> Acceptable:
    result: Acceptable = []
    for dim, kv in _splits(query, key, value, (grad_out, gate, bias, mask, out), is_causal):
        own, others = _own(dim), [aligned(t, dim, query.ndim) for t in (gate, bias, mask)]
        incoming = [None if t is None else own for t in (grad_out, grad_lse)]
        constants = [None] * 5  # scale to window
        arguments = [*incoming, own, kv, kv, *others, own, own, own, *constants, _lengths(key_lengths, dim)]
        grads = [gradient(p, split=dim is not None) for p in (own, kv, kv, *others[:2])]
        result.append(([g if wanted else None for g, wanted in zip(grads, grad_mask, strict=True)], arguments))
    return result


def gate_output(out: Any, gate: Any) -> Acceptable:
    return [([_own(dim)], [_own(dim), aligned(gate, dim, out.ndim)]) for dim in _split_or_any(out, (out, gate))]


def gate_output_backward(grad: Any, out: Any, gate: Any, grad_mask: Sequence[bool]) -> Acceptable:
    result: Acceptable = []
    for dim in _split_or_any(out, (grad, out, gate)):
        own, gates = _own(dim), aligned(gate, dim, out.ndim)
        grads = [own, gradient(gates, split=dim is not None)]
        wanted = [g if w else None for g, w in zip(grads, grad_mask, strict=True)]
        result.append((wanted, [own, own, gates, None]))
    return result


def _split_or_any(out: Any, tensors: Sequence[Any]) -> list[int | None]:
    possible = [dim for dim in range(out.ndim) if out.shape[dim] != 1]
    split = {dim for t in tensors for dim in _split_dims(t, out.ndim)}
    return [None, *(dim for dim in possible if dim in split or not split <= set(possible))]


#: By operator: its strategy, and the first argument that is no tensor and decides.
STRATEGIES: dict[str, tuple[Callable[..., Acceptable], str | None]] = {
    "_gated_attention_forward": (forward, "is_causal"),
    "_gated_attention_backward": (backward, "grad_mask"),
    "gate_output": (gate_output, None),
    "_gate_output_backward": (gate_output_backward, "grad_mask"),
}
