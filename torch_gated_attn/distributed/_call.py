# SPDX-License-Identifier: BSD-3-Clause
"""The arguments of a call whose keys are spread over processes, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group  # type: ignore[attr-defined]

_ops = torch.ops.torch_gated_attn

#: Of both operators; a group goes by its name, as in PyTorch's functional collectives, so that graphs can hold it.
SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? bias, Tensor? mask, float? scale, str masked_rows, "
    "bool is_causal, int? window, Tensor? key_lengths, str group, int[]? query_sizes, int[]? key_sizes"
)
TENSORS, KEY_LENGTHS, INPUTS = 6, 10, 14  # tensors that come first, the place of the last one, all arguments


@dataclasses.dataclass
class Call:
    """In the order of SCHEMA. Every tensor is this process's part."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    scale: float | None
    masked_rows: str
    is_causal: bool
    window: int | None
    key_lengths: Tensor | None
    group_name: str
    query_sizes: Sequence[int] | None
    key_sizes: Sequence[int] | None

    @property
    def group(self) -> ProcessGroup:
        group: ProcessGroup = _resolve_process_group(self.group_name)  # type: ignore[arg-type]  # a str by another name
        return group

    def empty_result(self, keys: int) -> Tensor:
        """`out`, not filled. The operator's own checks see the call first, with all `keys` of bias and mask: an error
        after something was sent would leave the other processes waiting."""
        key, value = (_meta(t, (*t.shape[:-2], keys, t.shape[-1])) for t in (self.key, self.value))
        others = [None if t is None else _meta(t, t.shape) for t in (self.gate, self.bias, self.mask)]
        lengths = None if self.key_lengths is None else _meta(self.key_lengths, self.key_lengths.shape)
        query = torch.empty_strided(self.query.shape, self.query.stride(), dtype=self.query.dtype, device="meta")
        visibility = self.masked_rows, self.is_causal, self.window, lengths
        out = _ops._gated_attention_forward(query, key, value, *others, self.scale, *visibility)[0]
        return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=self.query.device)


ARGUMENTS = tuple(field.name for field in dataclasses.fields(Call))


def _meta(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the queries and keys of every process of the group stand among all of them."""

    rank: int
    queries: Sequence[int]
    keys: Sequence[int]

    @property
    def count(self) -> int:
        return len(self.keys)

    @property
    def all_keys(self) -> int:
        return sum(self.keys)

    def key_range(self, rank: int) -> tuple[int, int]:
        begin = sum(self.keys[:rank])
        return begin, begin + self.keys[rank]

    def shift(self, rank: int) -> int:
        """The position of this process's first query, counted from the first key of `rank`: the last query of all
        stands at the last key of all."""
        return self.all_keys - sum(self.queries) + sum(self.queries[: self.rank]) - self.key_range(rank)[0]


def places(call: Call, *, queries_are_split: bool) -> Places:
    """From the sizes that the caller named, or asked of the group: one small exchange that the device waits for."""
    group = call.group
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    own = call.query.shape[-2], call.key.shape[-2]
    hides = call.is_causal or call.key_lengths is not None or call.masked_rows == "mean"
    matter = queries_are_split and call.is_causal, queries_are_split or hides
    sizes = [
        _checked("query_sizes", call.query_sizes, own[0], rank, count) if matter[0] else _alone(own[0], rank, count),
        _checked("key_sizes", call.key_sizes, own[1], rank, count) if matter[1] else _alone(own[1], rank, count),
    ]
    if None in sizes:
        both = torch.tensor(own, device=call.key.device)
        asked = [torch.empty_like(both) for _ in range(count)]
        dist.all_gather(asked, both, group)
        columns = torch.stack(asked).T.tolist()
        sizes = [column if given is None else given for given, column in zip(sizes, columns, strict=True)]
    queries, keys = sizes
    return Places(rank, queries or [], keys or [])


def _checked(name: str, sizes: Sequence[int] | None, own: int, rank: int, count: int) -> list[int] | None:
    if sizes is not None and (len(sizes) != count or min(sizes) < 0 or sizes[rank] != own):
        kind = name.split("_")[0]
        raise ValueError(
            f"{name} must be the number of {kind} positions of each of the group's {count} processes, {own} of process "
            f"{rank}, but is {list(sizes)}"
        )
    return None if sizes is None else list(sizes)


def _alone(size: int, rank: int, count: int) -> list[int] | None:
    """Where nobody asks for those of the others, or there are none: whole queries stand where a single process's would."""
    return [size if r == rank else 0 for r in range(count)]
