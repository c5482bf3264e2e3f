# SPDX-License-Identifier: BSD-3-Clause
"""Ring and split-key attention as operators: further cases of test_distributed_ring.py, on four processes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from processes import gap
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from torch_gated_attn import gated_attention, reference
from torch_gated_attn.distributed import _ring, ring_gated_attention, split_key_attention

Q, K, D = 8, 12, 4
KEYS_DIM = 2  # of [B, H, K, D]


def whole_arguments(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    """query, key, value, gate, bias; mask; cotangent."""
    shapes = (3, 4, Q, D), (3, 4, K, D), (3, 4, K, D), (3, 4, Q, D), (4, Q, K)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return tensors, torch.rand(3, 1, Q, K) > 0.3, torch.randn(3, 4, Q, D, dtype=torch.float64).to(dtype)


class Parts:
    """What one process has of the arguments of a function, and of the expected results."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype = torch.float64) -> None:
        self.function, self.ring = function, function is ring_gated_attention
        self.tensors, self.mask, self.cotangent = whole_arguments(dtype)
        leaves = [t.double().clone().requires_grad_() for t in self.tensors]
        self.out = reference.gated_attention(*leaves, self.mask)
        self.grads = torch.autograd.grad(self.out, leaves, self.cotangent.double())

    def own(self, i: int, tensor: Tensor) -> Tensor:
        """i: which of query, key, value, gate, bias, mask, out."""
        dim = -2 if i in (1, 2) or self.ring else -1 if i in (4, 5) else None
        whole = dim is None
        return tensor.clone() if whole else tensor.tensor_split(dist.get_world_size(), dim)[dist.get_rank()].contiguous()

    def leaves(self) -> list[Tensor]:
        return [self.own(i, t).requires_grad_() for i, t in enumerate(self.tensors)]

    def call(self, *tensors: Tensor) -> Tensor:
        out = self.function(*tensors, self.own(5, self.mask), group=dist.group.WORLD)
        return out * self.own(6, self.cotangent)

    def worst(self, run: Callable[..., Tensor]) -> float:
        """The largest error of the gradients of the sum of what `run` returns."""
        leaves = self.leaves()
        run(*leaves).sum().backward()
        return max(gap(leaf.grad, self.own(i, g)) for i, (leaf, g) in enumerate(zip(leaves, self.grads, strict=True)))

    def flat(self) -> tuple[Any, ...]:
        constants = None, "zero", False, None, None, dist.group.WORLD.group_name, None, None
        return *self.leaves(), self.own(5, self.mask), *constants


def compiled(parts: Parts) -> str:
    error = parts.worst(torch.compile(parts.call, fullgraph=True, backend="aot_eager"))
    return "" if error < 1e-12 else f"{error:.1e}"


def checkpointed(parts: Parts) -> str:
    error = parts.worst(lambda *a: checkpoint(parts.call, *a, use_reentrant=False))
    return "" if error < 1e-12 else f"{error:.1e}"


def opcheck(parts: Parts) -> str:
    name = "_ring_gated_attention" if parts.ring else "_split_key_attention"
    ops, flat = torch.ops.torch_gated_attn, parts.flat()
    torch.library.opcheck(getattr(ops, name).default, flat)
    flat = tuple(t.detach() if isinstance(t, Tensor) else t for t in flat)
    out, lse, row_max, row_sum = getattr(ops, name)(*flat)
    for wanted, grad_lse in (([True] * 5, lse), ([True, False, True, False, False], None)):
        residuals = torch.randn_like(out), grad_lse, out, row_max, row_sum, wanted
        torch.library.opcheck(getattr(ops, f"{name}_backward").default, (*residuals, *flat))
    return ""


def twice(parts: Parts) -> str:
    leaves = parts.leaves()
    grads = torch.autograd.grad(parts.call(*leaves).sum(), leaves, create_graph=True)
    try:
        grads[0].sum().backward()
    except NotImplementedError as error:
        return "" if str(error).endswith("cannot be differentiated twice") else str(error)
    return "no error"


def autocast(parts: Parts) -> str:
    """query, key, value and gate in low precision, a float32 bias as it is, as the operator alone does."""
    tensors = [t.float() for t in parts.leaves()]
    with torch.autocast("cpu", torch.bfloat16):
        out = parts.function(*tensors, parts.own(5, parts.mask), group=dist.group.WORLD)
    low = [t.detach().bfloat16() for t in tensors[:4]]
    same = parts.function(*low, tensors[4].detach(), parts.own(5, parts.mask), group=dist.group.WORLD)
    wide = parts.function(*parts.leaves(), parts.own(5, parts.mask), group=dist.group.WORLD)
    with torch.autocast("cpu", torch.bfloat16):
        still = parts.function(*parts.leaves(), parts.own(5, parts.mask), group=dist.group.WORLD)
    ok = out.dtype == torch.bfloat16 and torch.equal(out, same) and torch.equal(wide, still)
    out.float().square().sum().backward()  # through the casts
    return "" if ok and parts.tensors[0].dtype == still.dtype else f"{out.dtype}, {gap(out, same):.1e}"


def repeats(parts: Parts) -> str:
    """The same bits, forward and backward."""
    runs = []
    for _ in range(2):
        leaves = parts.leaves()
        out = parts.call(*leaves)
        runs.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    return "" if all(map(torch.equal, *runs)) else "other bits"


def saved_bytes(groups: list[dist.ProcessGroup]) -> str:
    """Besides its arguments the forward keeps out and two numbers a row, in a group of any size."""
    for group in groups:
        kept: dict[int, int] = {}
        t = [torch.randn(2, 2, 6, 4).requires_grad_() for _ in range(4)]
        known = {x.data_ptr() for x in t}

        def pack(x: Tensor, kept: dict[int, int] = kept, known: set[int] = known) -> Tensor:
            if x.data_ptr() not in known:
                kept[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = ring_gated_attention(*t, group=group)
        expected = 4 * (out.numel() + 2 * out.shape[:-1].numel())
        if sum(kept.values()) != expected:
            return f"{dist.get_world_size(group)} processes: {sum(kept.values())}, expected {expected}"
    return ""


def shards_alive() -> str:
    """Of keys that travel, and of the caller's own: at most the one in use and the one that arrives."""
    query, key = torch.randn(2, 2, 5, 3), torch.randn(2, 2, 7, 3)
    value, most, real = torch.randn(2, 2, 7, 3), 0, _ring._ops

    class Counting:
        _gated_attention_backward = staticmethod(real._gated_attention_backward)

        @staticmethod
        def _gated_attention_forward(*args: Any) -> Any:
            nonlocal most
            found = {t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) is Tensor and t.shape == key.shape}
            most = max(most, len(found))
            return real._gated_attention_forward(*args)

    _ring._ops = Counting
    try:
        ring_gated_attention(query, key, value, group=dist.group.WORLD)
    finally:
        _ring._ops = real
    return "" if most == 2 * (1 + 2) else f"{most} shards of key and value, with the caller's own"


def refusals() -> str:
    """One sentence each; nothing was sent, so that a right call works afterwards."""
    q, k = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 5, 4)
    world, count = dist.group.WORLD, dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    spread, whole = distribute_tensor(torch.randn(2, 2, 8, 4), mesh, [Shard(2)]), distribute_tensor(q, mesh, [Replicate()])
    ring, split = ring_gated_attention, split_key_attention
    calls: dict[str, Callable[[], Any]] = {
        "group must be": lambda: ring(q, k, k),
        "bias must be broadcastable": lambda: ring(q, k, k, bias=torch.zeros(4, 5), group=world),
        "bias must be broadcastable to": lambda: split(q, k, k, bias=torch.zeros(4, 5 * count), group=world),
        "mask must be bool": lambda: ring(q, k, k, mask=torch.zeros(4, 5 * count), group=world),
        "masked_rows must be": lambda: ring(q, k, k, masked_rows="some", group=world),
        "masked_rows must be ": lambda: split(q, k, k, masked_rows="some", group=world),
        "window must be None": lambda: ring(q, k, k, window=3, group=world),
        "key_lengths must": lambda: ring(q, k, k, key_lengths=torch.ones(3, dtype=torch.int64), group=world),
        "key_sizes must be": lambda: ring(q, k, k, key_sizes=[5], group=world),
        "query_sizes must be": lambda: ring(q, k, k, query_sizes=[3] * count, is_causal=True, group=world),
        "key must have": lambda: ring(q, torch.randn(2, 2, 5, 3), k, group=world),
        "group must be None": lambda: ring(spread, spread, spread, group=world),
        "key must be split": lambda: ring(whole, whole, whole),
        "query must be a DTensor": lambda: ring(q, spread, spread),
    }
    wrong = []
    for start, call in calls.items():
        try:
            call()
            wrong.append(f"{start}: no error")
        except (ValueError, TypeError) as error:
            if not str(error).startswith(start.strip()):
                wrong.append(f"{start}: {error}")
    if not torch.isfinite(ring(q, k, k, group=world)).all():
        wrong.append("the call after")
    return "; ".join(wrong)


def as_dtensors(
    mesh: DeviceMesh,
    query_dims: list[int | None],
    ring: bool = True,
    heads: tuple[int, int] = (4, 4),
    bias: tuple[int, ...] | None = None,
    lengths: bool = False,
    **options: Any,
) -> str:
    """On a mesh whose last dimension splits the keys; query_dims: what the dimensions split of query."""
    bias = (heads[0], Q, K) if bias is None else bias
    shapes = (4, 4, heads[0], Q, D), (4, 4, heads[1], K, D), (4, 4, heads[1], K, D), (4, 4, heads[0], Q, 1), bias
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    key_lengths = torch.randint(0, K + 1, (4, 4)) if lengths else None
    mask = torch.rand(4, 4, 1, 1, K) > 0.3
    cotangent = torch.randn(4, 4, heads[0], Q, D, dtype=torch.float64)
    query, key = torch.arange(Q).unsqueeze(-1) + K - Q, torch.arange(K)
    seen = mask & (key <= query) if options.get("is_causal") else mask
    seen = seen if key_lengths is None else seen & (key < key_lengths[..., None, None, None])
    leaves = [t.clone().requires_grad_() for t in tensors]
    plain = {k: v for k, v in options.items() if k != "is_causal"}
    expected, lse = reference.gated_attention_with_lse(*leaves, seen, **plain)
    true = torch.autograd.grad([expected, lse], leaves, [cotangent, cotangent[..., 0]])

    def place(i: int, t: Tensor) -> DTensor:
        placements = []
        for m, dim in enumerate(query_dims):
            if i in (1, 2) and m == len(query_dims) - 1:
                dim = -2
            own = -1 if dim is None else t.ndim + dim
            broadcast = own < 0 or t.shape[own] == 1 or (i in (1, 2) and dim == -2 and m < len(query_dims) - 1)
            placements.append(Replicate() if broadcast else Shard(own))
        return distribute_tensor(t, mesh, placements)

    spread = [place(i, t).requires_grad_() for i, t in enumerate(tensors)]
    everywhere = [Replicate()] * mesh.ndim
    masks = distribute_tensor(mask, mesh, everywhere)
    lengths_ = None if key_lengths is None else distribute_tensor(key_lengths, mesh, everywhere)
    function = ring_gated_attention if ring else split_key_attention
    results = function(*spread, masks, key_lengths=lengths_, return_lse=True, **options)
    out = results[0]
    cotangents = [distribute_tensor(t, mesh, out.placements) for t in (cotangent, cotangent[..., 0].contiguous())]
    grads = torch.autograd.grad(results, spread, cotangents)
    wrong = [] if list(out.placements) == list(spread[0].placements) else [f"out has placements {out.placements}"]
    if out.transpose(-2, -3).flatten(-2).shape != (4, 4, Q, heads[0] * D):
        wrong.append("shape")
    errors = [gap(out.full_tensor(), expected)] + [gap(g.full_tensor(), t) for g, t in zip(grads, true, strict=True)]
    if not max(errors) < 1e-12:
        wrong.append(f"errors {errors}")
    if bias[-2:-1] == (1,) and ring and grads[4].placements[-1] != Partial():
        wrong.append(f"d_bias has placements {grads[4].placements}")
    return "; ".join(wrong)


def uneven_heads(grid: DeviceMesh) -> str:
    """Groups of heads that the mesh would tear are refused."""
    query = distribute_tensor(torch.randn(2, 12, 4, 4), grid, [Shard(1), Shard(2)])
    key = distribute_tensor(torch.randn(2, 3, 4, 4), grid, [Replicate(), Shard(2)])
    try:
        ring_gated_attention(query, key, key)
    except ValueError as error:
        return "" if str(error).startswith("key must have heads divisible by the 2 parts") else str(error)
    return "no error"


def split_queries_causal(grid: DeviceMesh) -> str:
    query = distribute_tensor(torch.randn(2, 2, 8, 4), grid, [Shard(2), Shard(2)])
    key = distribute_tensor(torch.randn(2, 2, 8, 4), grid, [Replicate(), Shard(2)])
    try:
        ring_gated_attention(query, key, key, is_causal=True)
    except ValueError as error:
        return "" if str(error).startswith("is_causal needs") else str(error)
    return "no error"


def plain_beside_sharded() -> str:
    """One process's DTensors of one shard: the ring of one is the operator."""
    t = [torch.randn(2, 2, 4, 4, dtype=torch.float64) for _ in range(3)]
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    error = gap(ring_gated_attention(*t, group=alone), gated_attention(*t))
    return "" if error < 1e-12 else f"{error:.1e}"


def operator_cases(groups: dict[str, dist.ProcessGroup]) -> dict[str, Callable[[], str]]:
    line, grid = init_device_mesh("cpu", (dist.get_world_size(),)), init_device_mesh("cpu", (2, 2))
    cases: dict[str, Callable[[], str]] = {}
    for function in (ring_gated_attention, split_key_attention):
        for check in (compiled, checkpointed, opcheck, twice, autocast, repeats):
            cases[f"{function.__name__} {check.__name__}"] = lambda f=function, c=check: c(Parts(f))
    own = [groups[name] for name in ("two a", "two b", "four") if name in groups]
    none: list[int | None] = [None]
    return {
        **cases,
        "saved bytes": lambda: saved_bytes(own),
        "shards alive": shards_alive,
        "refusals": refusals,
        "ring of one": plain_beside_sharded,
        "DTensor ring": lambda: as_dtensors(line, [-2]),
        "DTensor ring, mean, bias of all queries": lambda: as_dtensors(line, [-2], bias=(4, 1, K), masked_rows="mean"),
        "DTensor ring, causal, lengths": lambda: as_dtensors(line, [-2], is_causal=True, lengths=True),
        "DTensor ring, rows x keys": lambda: as_dtensors(grid, [-4, -2], lengths=True),
        "DTensor ring, heads x keys, grouped": lambda: as_dtensors(grid, [-3, -2], heads=(4, 2)),
        "DTensor ring, heads x keys, multi-query": lambda: as_dtensors(grid, [-3, -2], heads=(4, 1)),
        "DTensor ring, queries x keys": lambda: as_dtensors(grid, [-2, -2]),
        "DTensor split keys": lambda: as_dtensors(line, none, ring=False),
        "DTensor split keys, one bias for all": lambda: as_dtensors(line, none, ring=False, bias=(4, Q, 1)),
        "DTensor split keys, rows x keys": lambda: as_dtensors(grid, [-4, None], ring=False, is_causal=True),
        "DTensor ring, torn groups": lambda: uneven_heads(grid),
        "DTensor ring, causal, queries split twice": lambda: split_queries_causal(grid),
    }
