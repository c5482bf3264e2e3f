# SPDX-License-Identifier: BSD-3-Clause
"""The cases of test_distributed_modules.py: modules whose inputs or parameters are split, beside one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from processes import gap
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import torch_gated_attn.distributed
from torch_gated_attn import GatedAttention
from torch_gated_attn.alphafold import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    TriangleAttention,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import axial_parallelism

EXACT = 1e-12


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


class Received(TorchDispatchMode):
    """Numbers that each process receives in collectives, by collective."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.numbers = count, dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does to its local tensors comes here
        out = func(*args, **(kwargs or {}))
        for name in self.numbers:
            if name in str(func) and isinstance(out, Tensor):
                largest = max(out.numel(), args[0].numel())
                self.numbers[name] += largest * (self.count - 1) / self.count * (2 if name == "all_reduce" else 1)
        return out


def block(run: Callable[..., Any], mesh: DeviceMesh, placements: list[Any]) -> str:
    error, _, _ = axial_parallelism.compare(run, mesh, placements)
    return "" if error < EXACT else f"{error:.1e}"


def traffic_of_axial(line: DeviceMesh) -> str:
    """A block receives two biases and one turn of the pair representation; the mask, a byte a pair, is turned too."""
    n, channels, heads, count = 16, 8, 2, line.size()
    block = distribute_module(axial_parallelism.PairBlock(channels, heads, dtype=torch.float64), line)
    pair = distribute_tensor(torch.randn(1, n, n, channels, dtype=torch.float64), line, [Shard(1)])
    mask = distribute_tensor(torch.rand(1, n, n) > 0.2, line, [Shard(1)])
    with Received(count) as received, torch.no_grad():
        axial_parallelism.axial(block, pair, mask)
    share = (count - 1) / count
    # gloo has no all_to_all: it gathers the pair and the mask, `count` times what NCCL receives
    expected = share * (2 * n * n * heads + n * n * channels + n * n)
    return "" if received.numbers["all_gather"] == expected else f"{received.numbers}, expected {expected}"


def attention(seed: int = 1) -> GatedAttention:
    torch.manual_seed(seed)
    module = GatedAttention(16, 4, value_dim=24, zero_init=False, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def tensor_parallel(mesh: DeviceMesh, local: bool, data: DeviceMesh | None = None) -> str:
    """Heads over `mesh`, by PyTorch's own styles; parameters sharded over `data` as well."""
    whole, module = attention(), attention()
    columns = partial(ColwiseParallel, use_local_output=local)
    plan = {name: columns() for name in ("linear_q", "linear_k", "linear_v", "linear_g")}
    parallelize_module(module, mesh, {**plan, "linear_o": RowwiseParallel(input_layouts=Shard(-1))})
    if data is not None:
        fully_shard(module, mesh=data)
    x, cotangent = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    mask, bias = torch.rand(2, 1, 5) > 0.2, torch.randn(4, 5, 5, dtype=torch.float64)
    spread = distribute_tensor(bias, mesh, [Shard(0)])
    given = (spread.to_local() if local else spread).detach().requires_grad_()
    masks = mask if local else distribute_tensor(mask, mesh, [Replicate()])
    leaf, whole_bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    with CommDebugMode() as forward:
        out = module(leaf, mask=masks, bias=given)
    out.backward(cotangent)
    expected_leaf = x.clone().requires_grad_()
    expected = whole(expected_leaf, mask=mask, bias=whole_bias)
    expected.backward(cotangent)
    d_bias = DTensor.from_local(given.grad, mesh, [Shard(0)]) if local else given.grad
    pairs = [(out, expected), (leaf.grad, expected_leaf.grad), (d_bias, whole_bias.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(module.parameters(), whole.parameters(), strict=True)]
    error = max(gap(full(a), b) for a, b in pairs)
    reduced = forward.get_comm_counts()[torch.ops.c10d_functional.all_reduce]
    return "" if error < EXACT and reduced == 1 else f"{error:.1e}, {forward.get_comm_counts()}"


def evoformer_module(
    make: Callable[[], nn.Module], shapes: list[tuple[int, ...]], mesh: DeviceMesh, dims: list[int | None]
) -> str:
    """An AlphaFold module on sharded representations; shapes: msa or pair, mask, and what else; dims: split of each."""
    torch.manual_seed(2)
    whole = make()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.5)
    split = distribute_module(make(), mesh)
    for p, q in zip(split.parameters(), whole.parameters(), strict=True):
        p.data.copy_(distribute_tensor(q.data, mesh, [Replicate()]))
    tensors = [torch.randn(s, dtype=torch.float64) if i != 1 else torch.rand(s) > 0.2 for i, s in enumerate(shapes)]
    spread = [
        distribute_tensor(t, mesh, [Replicate() if d is None else Shard(d)]) for t, d in zip(tensors, dims, strict=True)
    ]
    for t in (*tensors, *spread):
        t.requires_grad_(t.is_floating_point())
    expected, out = whole(*tensors), split(*spread)
    cotangent = torch.randn(expected.shape, dtype=expected.dtype)  # distribute_tensor loses the strides of a permuted one
    expected.backward(cotangent)
    out.backward(distribute_tensor(cotangent, mesh, out.placements))
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(spread, tensors, strict=True) if b.requires_grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(split.parameters(), whole.parameters(), strict=True)]
    # The true gradient of a norm's bias that only shifts logits is 0, and has no size to compare with.
    vanishing = [b.abs().max() < 1e-12 for _, b in pairs]
    error = max(gap(full(a), b) for (a, b), zero in zip(pairs, vanishing, strict=True) if not zero)
    rest = max((full(a).abs().max().item() for (a, _), zero in zip(pairs, vanishing, strict=True) if zero), default=0.0)
    return "" if error < EXACT and rest < EXACT else f"{error:.1e}, {rest:.1e}"


def context_parallel_is_refused(line: DeviceMesh) -> str:
    from torch.distributed.tensor.experimental import context_parallel

    t = [torch.randn(1, 2, 16, 4) for _ in range(3)]
    module, x = GatedAttention(8, 2), torch.randn(1, 16, 8)
    wrong = []
    calls: list[Callable[[], Any]] = [
        lambda: torch_gated_attn.gated_attention(*t),
        lambda: torch_gated_attn.gated_attention_with_lse(*t),
        lambda: module(x),
    ]
    with context_parallel(line, buffers=[*t, x], buffer_seq_dims=[2, 2, 2, 1]):
        for call in calls:
            try:
                call()
                wrong.append("no error")
            except RuntimeError as error:
                if not str(error).startswith("gated_attention must not be called inside context_parallel()"):
                    wrong.append(str(error))
    for call in calls:
        call()
    return "; ".join(wrong)


#: torch 2.11 refuses nn.Linear on a DTensor that is sharded behind another dimension.
LINEAR_TAKES_INNER_SHARDS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


def module_cases(count: int) -> dict[str, Callable[[], str]]:
    line, grid = (
        init_device_mesh("cpu", (count,)),
        init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("data", "heads")),
    )
    wide = {"zero_init": False, "dtype": torch.float64}
    msa, mask, pair = (2, 8, 8, 16), (2, 8, 8), (2, 8, 8, 4)
    axial, tiles = axial_parallelism.axial, axial_parallelism.grid
    row = lambda: MSARowAttentionWithPairBias(16, 4, 4, **wide)  # noqa: E731
    column = lambda: MSAColumnAttention(16, 4, **wide)  # noqa: E731
    overall = lambda: MSAColumnGlobalAttention(16, 4, dtype=torch.float64)  # noqa: E731
    triangle = lambda starting: lambda: TriangleAttention(16, 4, starting=starting, **wide)  # noqa: E731
    cases = {
        "pair block, axial": lambda: block(axial, line, [Shard(1)]),
        "pair block, grid with a ring": lambda: block(tiles, grid, [Shard(1), Shard(2)]),
        "pair block, axial, received": lambda: traffic_of_axial(line),
        "heads, DTensors": lambda: tensor_parallel(line, local=False),
        "heads, local tensors": lambda: tensor_parallel(line, local=True),
        "heads and sharded parameters": lambda: tensor_parallel(grid["heads"], local=False, data=grid["data"]),
        "MSA rows, sequences split": lambda: evoformer_module(row, [msa, mask, pair], line, [1, 1, None]),
        "MSA rows, batch and pair whole": lambda: evoformer_module(row, [msa, mask, pair], line, [1, None, None]),
        "MSA columns, columns split": lambda: evoformer_module(column, [msa, mask], line, [2, 2]),
        "MSA global, columns split": lambda: evoformer_module(overall, [msa, mask], line, [2, 2]),
        "context_parallel": lambda: context_parallel_is_refused(line),
        "triangle, starting, rows split": lambda: evoformer_module(triangle(True), [msa, mask], line, [1, 1]),
        "triangle, ending, columns split": lambda: evoformer_module(triangle(False), [msa, mask], line, [2, 2]),
    }
    takes_part = ("",) if LINEAR_TAKES_INNER_SHARDS else ("heads", "context_parallel")
    return {name: case for name, case in cases.items() if name.startswith(takes_part)}
