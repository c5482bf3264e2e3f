# SPDX-License-Identifier: BSD-3-Clause
"""Attention over keys that are spread over processes, as Python functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup
from torch.distributed.tensor import DTensor

from . import _dtensor, _operators

__all__ = ["ring_gated_attention", "split_key_attention"]


def ring_gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    scale: float | None = None,
    masked_rows: str = "zero",
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Tensor | None = None,
    query_sizes: Sequence[int] | None = None,
    key_sizes: Sequence[int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`gated_attention` of all queries and keys of a process group, each process holding a part of both.

    Keys and values travel round the group while each process attends to those at hand; bias, mask and their gradients stay
    where the queries are. With Qp queries and Kp keys on this process, which may differ between processes and be 0, and K
    keys in all, processes in the order of their ranks in the group:

    Args:
        query: [\*, H, Qp, D].
        key, value: [\*, Hkv, Kp, D] and [\*, Hkv, Kp, Dv].
        gate: broadcastable to [\*, H, Qp, Dv].
        bias, mask: broadcastable to [\*, H, Qp, K]: this process's queries and all keys.
        group: the process group; not with DTensor arguments.
        scale, masked_rows, key_lengths: as of :func:`~torch_gated_attn.gated_attention`, among all keys.
        is_causal, window: the same, by the positions of queries and keys among all: the last query of all stands at the
            last key of all.
        query_sizes, key_sizes: Qp and Kp of every process, if the caller knows them. Otherwise they are asked of the group,
            which a CUDA device waits for; query_sizes only where `is_causal`.
        return_lse: also return lse.

    Returns:
        out [\*, H, Qp, Dv] in the memory order of query, and, if asked for, lse [\*, H, Qp].

    Raises:
        ValueError, TypeError: as of :func:`~torch_gated_attn.gated_attention`, before anything is sent; `key_sizes` that do
            not fit.
        NotImplementedError: a second derivative.

    DTensor arguments say the group themselves: `key` is split over its positions, Shard(-2 + rank), on one mesh dimension,
    and query is moved there if it is not. The other mesh dimensions may split batch dimensions, heads and queries as in
    `query`; every other argument is moved there, which costs nothing if it is there.

    Every process of the group must call it, forward and backward, with the same options and the same arguments requiring
    gradients. Gradients are those of this process's part: of an argument that is the same for all queries (a bias
    [H, 1, K]) every process has its share of the sum, and as a DTensor it is Partial.

    The backward needs out and two numbers for each row besides the arguments, however many processes there are. Both ways
    every process sends Kp (D + Dv) numbers a head and step; the gradients of key and value travel too, in float32.

    The source of the formula is the merge of softmaxes over parts: Liu et al. 2023, Ring Attention with Blockwise
    Transformers; Milakov and Gimelshein 2018.
    """
    tensors = query, key, value, gate, bias, mask, key_lengths
    sizes = {"query_sizes": query_sizes, "key_sizes": key_sizes}
    options = {"scale": scale, "masked_rows": masked_rows, "is_causal": is_causal, "window": window}
    results = _attend("_ring_gated_attention", tensors, group, options, sizes, queries_are_split=True)
    return results if return_lse else results[0]


def split_key_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    scale: float | None = None,
    masked_rows: str = "zero",
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Tensor | None = None,
    key_sizes: Sequence[int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`gated_attention` of whole queries, the same on every process of a group, to keys that are spread over it.

    For a bias that is split over keys: nothing travels but each row's numerators and denominators, [\*, H, Q, Dv + 2]
    numbers forward and the gradient of query backward. With Kp keys on this process, which may differ between processes
    and be 0:

    Args:
        query: [\*, H, Q, D], the same on every process.
        key, value: [\*, Hkv, Kp, D] and [\*, Hkv, Kp, Dv].
        gate: broadcastable to [\*, H, Q, Dv], the same on every process.
        bias, mask: broadcastable to [\*, H, Q, Kp]: this process's keys.
        group: the process group; not with DTensor arguments, where `key` is split over its positions on one mesh dimension.
        scale, masked_rows, is_causal, window, key_lengths: as of :func:`~torch_gated_attn.gated_attention`, among all keys.
        key_sizes: Kp of every process, if the caller knows them. Otherwise they are asked of the group where is_causal,
            key_lengths or masked_rows="mean" need them.
        return_lse: also return lse.

    Returns:
        out [\*, H, Q, Dv] and, if asked for, lse [\*, H, Q], the same on every process.

    Raises:
        As :func:`ring_gated_attention`.

    Every process computes the same loss from the same result. The gradients of query and gate are complete and the same on
    every process, the others those of this process's keys: of a bias that is the same for all keys every process has its
    share of the sum, and as a DTensor it is Partial.
    """
    tensors = query, key, value, gate, bias, mask, key_lengths
    options = {"scale": scale, "masked_rows": masked_rows, "is_causal": is_causal, "window": window}
    results = _attend("_split_key_attention", tensors, group, options, {"key_sizes": key_sizes}, queries_are_split=False)
    return results if return_lse else results[0]


def _attend(
    name: str,
    tensors: tuple[Tensor | None, ...],
    group: ProcessGroup | None,
    options: dict[str, Any],
    sizes: dict[str, Sequence[int] | None],
    queries_are_split: bool,
) -> tuple[Tensor, Tensor]:
    names = ("query", "key", "value", "gate", "bias", "mask", "key_lengths")
    arguments = dict(zip(names, tensors, strict=True))
    if isinstance(arguments["key"], DTensor):
        for given, value in (("group", group), *sizes.items()):
            if value is not None:
                raise ValueError(f"{given} must be None with DTensor arguments, which say it, but is {value}")
        return _dtensor.attend(_operators.caller(name), arguments, queries_are_split, options)
    if group is None:
        raise ValueError("group must be a process group, as the arguments are not DTensors, but is None")
    return _operators.caller(name)(**arguments, group=group, **options, **sizes)
