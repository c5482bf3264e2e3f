# SPDX-License-Identifier: BSD-3-Clause
"""What each process of test_distributed.py runs, and the same in one process; float64, lest rounding hide a difference."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_gated_attn import GatedAttention

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from evoformer.data import Example, load_family, training_example
from evoformer.implementations import IMPLEMENTATIONS
from evoformer.model import Evoformer

PROCESSES, STEPS, COLUMNS = 2, 2, 10
HEADS, Q_DIM, KV_DIM, OUTPUT_DIM = 4, 16, 12, 10


def make_model() -> Evoformer:
    torch.manual_seed(0)
    return Evoformer(IMPLEMENTATIONS["operator"], blocks=1).double()


def loss_of(model: nn.Module, example: Example) -> Tensor:
    # Not model.loss: the wrappers of torch.distributed act when the module itself is called.
    return nn.functional.cross_entropy(model(example).flatten(0, 1), example.labels.flatten())


def train(model: nn.Module, ranks: range) -> None:
    """Each rank's examples are its own; a step follows the mean of the losses of `ranks`."""
    sequences, _ = load_family()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [loss_of(model, training_example(sequences, PROCESSES * step + rank, COLUMNS)) for rank in ranks]
        torch.stack(losses).mean().backward()
        optimizer.step()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    return {name.removeprefix("module."): whole(p.detach()) for name, p in model.named_parameters()}


def one_process() -> dict[str, Tensor]:
    model = make_model()
    train(model, range(PROCESSES))
    return parameters(model)


def ddp(rank: int) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(make_model())
    train(model, range(rank, rank + 1))
    return parameters(model)


def fsdp(rank: int) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = make_model(), init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, range(rank, rank + 1))
    return parameters(model)


def attention_call() -> tuple[GatedAttention, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A module with all its parameters random, q_data, m_data, mask, bias and a cotangent."""
    torch.manual_seed(1)
    module = GatedAttention(Q_DIM, HEADS, kv_dim=KV_DIM, output_dim=OUTPUT_DIM, q_bias=True, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    mask = torch.rand(3, 1, 8) > 0.3
    return module, normal(3, 5, Q_DIM), normal(3, 8, KV_DIM), mask, normal(HEADS, 5, 8), normal(3, 5, OUTPUT_DIM)


def part_of(module: GatedAttention, rank: int) -> GatedAttention:
    """The heads of `rank`: its rows of the projections, its columns of the output projection; one rank adds the bias."""
    share = lambda size: slice(rank * size // PROCESSES, (rank + 1) * size // PROCESSES)  # noqa: E731
    part = GatedAttention(
        module.q_dim,
        module.num_heads // PROCESSES,
        kv_dim=module.kv_dim,
        key_dim=module.key_dim // PROCESSES,
        value_dim=module.value_dim // PROCESSES,
        output_dim=module.output_dim,
        q_bias=module.linear_q.bias is not None,
        output_bias=rank == 0,
        dtype=module.linear_q.weight.dtype,
    )
    state = {}
    for name, x in module.state_dict().items():
        if name == "linear_o.weight":
            state[name] = x[:, share(x.size(1))]
        elif name != "linear_o.bias":
            state[name] = x[share(x.size(0))]
        elif rank == 0:
            state[name] = x
    part.load_state_dict(state)
    return part


def attend(module: GatedAttention, heads: slice, reduce: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    """The result and the gradients of `heads`, with `reduce` wherever a sum over heads ends."""
    _, q_data, m_data, mask, bias, cotangent = attention_call()
    inputs = q_data.requires_grad_(), m_data.requires_grad_(), bias[heads].requires_grad_()
    out = module(inputs[0], inputs[1], mask, inputs[2])
    names = [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(out, [*inputs, *module.parameters()], cotangent)
    results = dict(zip(["q_data", "m_data", "bias", *names], grads, strict=True), out=out.detach())
    for name in ("out", "q_data", "m_data"):
        reduce(results[name])
    return results


def tensor_parallel(rank: int) -> dict[str, Tensor]:
    heads = HEADS // PROCESSES
    results = attend(part_of(attention_call()[0], rank), slice(rank * heads, (rank + 1) * heads), dist.all_reduce)
    gathered: list[Any] = [None] * PROCESSES
    dist.all_gather_object(gathered, results)
    whole = {name: results[name] for name in ("out", "q_data", "m_data")}
    whole["linear_o.bias"] = gathered[0]["linear_o.bias"]
    for name in results.keys() - whole.keys():
        whole[name] = torch.cat([part[name] for part in gathered], dim=1 if name == "linear_o.weight" else 0)
    return whole


def one_process_attention() -> dict[str, Tensor]:
    return attend(attention_call()[0], slice(None), lambda x: x)


SCENARIOS = {"ddp": ddp, "fsdp": fsdp, "tensor parallel": tensor_parallel}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of this machine need not resolve
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        results = {name: scenario(rank) for name, scenario in SCENARIOS.items()}
    finally:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")
