# SPDX-License-Identifier: BSD-3-Clause
"""The cases of test_distributed_strategies.py: calls of the operator on DTensors beside the same call in one process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from processes import gap
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from torch_gated_attn import gated_attention_with_lse

NAMES = ("query", "key", "value", "gate", "bias", "mask", "key_lengths")
BATCH, ROWS, HEADS, QUERIES = -5, -4, -3, -2  # dimensions of [*, H, Q, K]
EXACT = 1e-12  # float64


@dataclasses.dataclass
class Case:
    """dims: the dimension that each mesh dimension splits, or None."""

    dims: tuple[int | None, ...]
    batch: tuple[int, ...] = (4, 8)
    heads: int = 4
    kv_heads: int | None = None
    q: int = 8
    k: int = 9
    gate: tuple[int, ...] | None = (4, 8, 4, 8, 4)
    bias: tuple[int, ...] | None = (4, 8, 9)
    mask: tuple[int, ...] | None = (4, 8, 1, 1, 9)
    lengths: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def draw(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(3)

        def normal(shape: Sequence[int] | None) -> Tensor | None:
            if shape is None:
                return None
            return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)

        kv = (*self.batch, self.heads if self.kv_heads is None else self.kv_heads, self.k, 4)
        mask = None if self.mask is None else torch.rand(self.mask, generator=generator) > 0.3
        if mask is not None:
            mask.view(-1)[: self.mask[-1]] = False  # rows that attend to no key
        lengths = torch.randint(0, self.k + 1, self.batch, generator=generator) if self.lengths else None
        query = normal((*self.batch, self.heads, self.q, 4))
        gate = self.gate
        if gate is not None and len(gate) == 5:
            gate = (*self.batch, self.heads, self.q, gate[-1])
        tensors = query, normal(kv), normal(kv), normal(gate), normal(self.bias), mask, lengths
        return dict(zip(NAMES, tensors, strict=True))


BARE: dict[str, Any] = {"gate": None, "bias": None, "mask": None}
CASES: dict[str, Case] = {
    "rows": Case((ROWS,)),
    "first batch dimension": Case((BATCH,)),
    "rows, uneven": Case((ROWS,), batch=(4, 6), mask=(4, 6, 1, 1, 9)),
    "rows, a bias of their own": Case((ROWS,), bias=(4, 8, 4, 8, 9)),
    "rows, no mask, no bias, headwise gate": Case((ROWS,), bias=None, mask=None, gate=(4, 8, 4, 8, 1)),
    "rows, nothing but query, key and value": Case((ROWS,), **BARE),
    "rows, mean": Case((ROWS,), options={"masked_rows": "mean"}),
    "rows, scale": Case((ROWS,), options={"scale": 0.1}),
    "rows, bias of rank 1": Case((ROWS,), bias=(9,), mask=(9,)),
    "rows, key_lengths": Case((ROWS,), lengths=True),
    "rows, causal": Case((ROWS,), options={"is_causal": True}),
    "heads": Case((HEADS,)),
    "heads, one bias": Case((HEADS,), bias=(1, 8, 9)),
    "heads, bias of rank 2, mask of queries": Case((HEADS,), bias=(8, 9), mask=(4, 8, 1, 8, 9)),
    "heads, grouped 8 to 4": Case((HEADS,), heads=8, kv_heads=4, bias=(8, 8, 9)),
    "heads, multi-query": Case((HEADS,), kv_heads=1),
    "heads, gate of rank 3": Case((HEADS,), gate=(4, 1, 1)),
    "heads, no batch": Case((HEADS,), batch=(), gate=None, mask=(1, 1, 9)),
    "heads, causal window, key_lengths": Case((HEADS,), lengths=True, options={"is_causal": True, "window": 3}),
    "queries": Case((QUERIES,)),
    "queries, uneven, mean": Case((QUERIES,), q=6, bias=(4, 6, 9), options={"masked_rows": "mean"}),
    "queries, one bias": Case((QUERIES,), bias=(4, 1, 9), gate=(4,)),
    "queries, key_lengths, mask of queries": Case((QUERIES,), lengths=True, mask=(4, 1, 1, 8, 9)),
    "whole": Case((None,)),
    "rows x heads": Case((ROWS, HEADS)),
    "rows x queries": Case((ROWS, QUERIES)),
    "batch x rows, a bias of each batch": Case((BATCH, ROWS), bias=(4, 1, 4, 8, 9)),
    "queries x queries": Case((QUERIES, QUERIES)),
    "whole x heads, grouped 4 to 2": Case((None, HEADS), kv_heads=2),
    "heads x rows, causal, key_lengths": Case((HEADS, ROWS), lengths=True, options={"is_causal": True}),
}


def placements(name: str, tensor: Tensor, dims: Sequence[int | None]) -> list[Any]:
    """Shard where the tensor has the dimension that is split, whole where it is broadcast over it, keys always whole."""
    result: list[Any] = []
    for dim in dims:
        own = -1 if dim is None else tensor.ndim + dim + (3 if name == "key_lengths" else 0)
        whole = own < 0 or own >= tensor.ndim or tensor.shape[own] == 1 or (name in ("key", "value") and dim == QUERIES)
        result.append(Replicate() if whole else Shard(own))
    return result


def gradient_placements(given: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    return [Partial() if p == Replicate() and dim is not None else p for p, dim in zip(given, dims, strict=True)]


def call(tensors: dict[str, Tensor | None], options: dict[str, Any], cotangents: Sequence[Tensor]) -> dict[str, Any]:
    """out, lse and all gradients. Only the operator runs: DTensor's own operators take seconds for each new shape."""
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if t is not None and n in NAMES[:5]}
    out, lse = gated_attention_with_lse(**tensors, **options)
    grads = torch.autograd.grad([out, lse], [*leaves.values()], [*cotangents])
    return {"out": out, "lse": lse, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}


def call_functional(
    tensors: dict[str, Tensor | None], options: dict[str, Any], cotangents: Sequence[Tensor]
) -> dict[str, Any]:
    """The same by the functional operators: autograd detaches results, which on a mesh of three dimensions takes a second
    for every new shape."""
    ops, *given, lengths = torch.ops.torch_gated_attn, *tensors.values()
    constants = options.get("scale"), options.get("masked_rows", "zero")
    visibility = options.get("is_causal", False), options.get("window"), lengths
    out, lse, row_max, row_sum = ops._gated_attention_forward(*given, *constants, *visibility)
    wanted = [t is not None for t in given[:5]]
    residuals = out, row_max, row_sum, *constants
    grads = ops._gated_attention_backward(*cotangents, *given, *residuals, wanted, *visibility)
    return {"out": out, "lse": lse, **{f"d_{n}": g for n, g in zip(NAMES, grads, strict=False) if g is not None}}


def compare(
    case: Case,
    mesh: DeviceMesh,
    dims: Sequence[int | None],
    whole: Callable[[Any], list[Tensor]],
    dtype: torch.dtype = torch.float64,
    moved: dict[str, Sequence[int | None]] | None = None,
    simulation: contextlib.AbstractContextManager[Any] = contextlib.nullcontext(),  # noqa: B008  # it has no state
) -> str:
    """What differs from one process, or "".

    whole: all values of a DTensor, once or as every rank has them. moved: other dimensions for some arguments, which then
    have to travel, and nothing but values is compared.
    """
    tensors = case.draw(dtype)
    like = tensors["query"]
    cotangents = [torch.randn(like.shape, dtype=torch.float64).to(dtype), torch.randn(like.shape[:-1], dtype=torch.float64)]
    cotangents[1] = cotangents[1].to(torch.promote_types(dtype, torch.float32))
    plain = {n: None if t is None else t.clone() for n, t in tensors.items()}
    expected = {n: t.detach() for n, t in call(plain, case.options, cotangents).items()}
    own = placements("query", like, dims)
    with simulation:
        spread = {
            n: None if t is None else distribute_tensor(t, mesh, placements(n, t, (moved or {}).get(n, dims)))
            for n, t in tensors.items()
        }
        spread_cotangents = [distribute_tensor(t, mesh, own) for t in cotangents]
        with CommDebugMode() as comm:
            one = call if isinstance(simulation, contextlib.nullcontext) else call_functional
            results = one(spread, case.options, spread_cotangents)
        with torch.no_grad():
            values_of = {name: whole(got) for name, got in results.items()}
    wrong = []
    if moved is None and comm.get_total_counts() != 0:
        wrong.append(f"collectives {comm.get_comm_counts()}")
    for name, true in expected.items():
        got = results[name]
        given = own if name in ("out", "lse") else placements(name[2:], tensors[name[2:]], dims)
        planned = given if name in ("out", "lse") else gradient_placements(given, dims)
        if moved is None and list(got.placements) != planned:
            wrong.append(f"{name} has placements {got.placements}, expected {planned}")
        same_bits = name != "d_bias" and Partial() not in planned and QUERIES not in dims and moved is None
        for values in map(Tensor.detach, values_of[name]):
            if same_bits and not torch.equal(values, true):
                wrong.append(f"{name} has other bits")
            finite, true_finite = values.nan_to_num(neginf=0), true.nan_to_num(neginf=0)
            if dtype == torch.float64 and not gap(finite, true_finite) < EXACT:
                wrong.append(f"{name} differs by {gap(finite, true_finite):.1e}")
            if not torch.equal(values == -torch.inf, true == -torch.inf):
                wrong.append(f"{name}: infinities differ")
    return "; ".join(wrong)


def full(tensor: DTensor) -> list[Tensor]:
    return [tensor.full_tensor()]


def line_cases(line: DeviceMesh, grid: DeviceMesh) -> dict[str, Callable[[], str]]:
    """Every case on a mesh of as many dimensions as it splits."""
    meshes = {1: line, 2: grid}
    return {name: lambda case=case: compare(case, meshes[len(case.dims)], case.dims, full) for name, case in CASES.items()}


def deep_dims(case: Case) -> tuple[int | None, ...]:
    """Three mesh dimensions: those of the case, and before them others that the case leaves."""
    others = [d for d in (BATCH, ROWS, HEADS) if d not in case.dims and -d <= len(case.batch) + 3]
    needed = 3 - len(case.dims)
    return (*(others + [None] * needed)[:needed], *(case.dims if case.kv_heads != 2 else case.dims[::-1]))


def deep_cases(mesh: DeviceMesh, simulation: contextlib.AbstractContextManager[Any]) -> dict[str, Callable[[], str]]:
    """Every case on a mesh of three dimensions, whose ranks are simulated."""

    def every_rank(tensor: DTensor) -> list[Tensor]:
        whole: Any = tensor.full_tensor()
        return list(whole._local_tensors.values())

    def run(case: Case) -> str:
        return compare(case, mesh, deep_dims(case), every_rank, simulation=simulation)

    # For time, without those that add nothing to three dimensions.
    left = ("rows, scale", "rows, nothing but query, key and value", "heads, no batch", "heads, gate of rank 3", "whole")
    return {name: lambda case=case: run(case) for name, case in CASES.items() if name not in left}


def bits_cases(line: DeviceMesh) -> dict[str, Callable[[], str]]:
    names = ("rows, a bias of their own", "heads, grouped 8 to 4")
    return {
        f"bits {name} {dtype}": lambda name=name, dtype=dtype: compare(CASES[name], line, CASES[name].dims, full, dtype)
        for name in names
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }


def moving_cases(line: DeviceMesh, grid: DeviceMesh) -> dict[str, Callable[[], str]]:
    """What cannot stay where it is: the result is right all the same."""
    causal = {"is_causal": True}
    return {
        "moves: queries, causal": lambda: compare(Case((QUERIES,), options=causal), line, (QUERIES,), full, moved={}),
        "moves: queries, causal window": lambda: compare(
            Case((QUERIES,), options={**causal, "window": 3}), line, (QUERIES,), full, moved={}
        ),
        "moves: grouped 4 to 2 over 4": lambda: compare(
            Case((HEADS,), kv_heads=2), line, (HEADS,), full, moved={"key": (None,), "value": (None,)}
        ),
        "moves: batch smaller than the mesh": lambda: compare(
            Case((BATCH,), batch=(3, 2), mask=None), line, (None,), full, moved=dict.fromkeys(NAMES, (BATCH,))
        ),
        "moves: heads twice, grouped 12 to 6": lambda: compare(
            Case((HEADS, HEADS), heads=12, kv_heads=6, bias=(12, 8, 9)), grid, (HEADS, HEADS), full,
            moved={"key": (None, None), "value": (None, None)},
        ),
    }  # fmt: skip


def masks_case(line: DeviceMesh, rows: int, masks: Sequence[int]) -> str:
    """A backward for every choice of gradients, in this order: DTensor must not take the placements of another choice."""
    case = Case((ROWS,), batch=(4, rows), mask=None)
    tensors = [t for t in case.draw().values() if t is not None]
    dims = case.dims
    ops = torch.ops.torch_gated_attn
    scale, policy = None, "zero"
    out, _, row_max, row_sum = ops._gated_attention_forward(*tensors, None, scale, policy)
    wrong = []

    def backward(tensors: Sequence[Tensor], rest: Sequence[Tensor], wanted: list[bool]) -> Sequence[Tensor | None]:
        grads: Sequence[Tensor | None] = ops._gated_attention_backward(
            rest[0], None, *tensors, None, *rest, scale, policy, wanted
        )
        return grads

    spread = [distribute_tensor(t, line, placements(n, t, dims)) for n, t in zip(NAMES, tensors, strict=False)]
    rest = [distribute_tensor(t, line, [Shard(1)]) for t in (out, row_max, row_sum)]
    for bits in masks:
        wanted = [bool(bits >> i & 1) for i in range(5)]
        expected = backward(tensors, (out, row_max, row_sum), wanted)
        for name, got, true in zip(NAMES, backward(spread, rest, wanted), expected, strict=False):
            if (got is None) != (true is None) or (got is not None and not gap(got.full_tensor(), true) < EXACT):
                wrong.append(f"{wanted} {name}")
    return "; ".join(wrong)


def causal_case(line: DeviceMesh, q: int, order: Sequence[bool]) -> str:
    """Calls that differ in is_causal alone, in this order; with key_lengths, lest the dispatcher leave a False out."""
    case = Case((QUERIES,), q=q, bias=None, lengths=True)
    wrong = [
        compare(dataclasses.replace(case, options={"is_causal": causal}), line, (QUERIES,), full, moved={})
        for causal in order
    ]
    return "; ".join(w for w in wrong if w)


def key_cases(line: DeviceMesh) -> dict[str, Callable[[], str]]:
    return {
        "grad_mask upwards": lambda: masks_case(line, 8, range(32)),
        "grad_mask downwards": lambda: masks_case(line, 12, range(31, -1, -1)),
        "is_causal last": lambda: causal_case(line, 8, (False, True)),
        "is_causal first": lambda: causal_case(line, 12, (True, False)),
    }


def gate_cases(line: DeviceMesh) -> dict[str, Callable[[], str]]:
    def run(shape: Sequence[int], dim: int, wanted: tuple[bool, bool]) -> str:
        from torch_gated_attn import gate_output

        out, gate, cotangent = (torch.randn(s, dtype=torch.float64) for s in ((4, 8, 6), shape, (4, 8, 6)))
        whole = [t.clone().requires_grad_(w) for t, w in zip((out, gate), wanted, strict=True)]
        own = [[Shard(dim)], placements("gate", gate, (dim - 3,))]
        spread = [distribute_tensor(t.detach(), line, p) for t, p in zip(whole, own, strict=True)]
        spread = [t.requires_grad_(w) for t, w in zip(spread, wanted, strict=True)]
        spread_cotangent = distribute_tensor(cotangent, line, own[0])
        with CommDebugMode() as comm:
            result = gate_output(*spread)
            (result * spread_cotangent).sum().backward()
        gate_output(*whole).backward(cotangent)
        wrong = [str(comm.get_comm_counts())] if comm.get_total_counts() else []
        for got, true, planned in zip(spread, whole, (own[0], gradient_placements(own[1], (dim,))), strict=True):
            if true.grad is None:
                continue
            if list(got.grad.placements) != planned or not gap(got.grad.full_tensor(), true.grad) < EXACT:
                wrong.append(f"{got.grad.placements} {planned}")
        return "; ".join(wrong)

    shapes = {"full": (4, 8, 6), "headwise": (4, 8, 1), "shared": (8, 6)}
    return {
        f"gate_output {name} {dim} {wanted}": lambda shape=shape, dim=dim, wanted=wanted: run(shape, dim, wanted)
        for name, shape in shapes.items()
        for dim in (0, 1)
        for wanted in ((True, False), (False, True), (True, True))
    }
