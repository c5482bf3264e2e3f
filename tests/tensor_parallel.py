# SPDX-License-Identifier: BSD-3-Clause
"""What each process of test_tensor_parallel.py runs: every module with its projections split over heads by PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import modules
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torch_gated_attn.alphafold import MSAColumnGlobalAttention

PROCESSES = 2


def split(module: nn.Module, mesh: DeviceMesh, leave: tuple[str, ...] = ()) -> nn.Module:
    """Projections to heads column-wise, the output projection row-wise; `leave` names those that stay whole."""
    plan: dict[str, Any] = {}
    shared = ["linear_k", "linear_v"] if isinstance(module, MSAColumnGlobalAttention) else []
    for path, layer in module.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(layer, nn.Linear) and name not in (*leave, *shared):
            plan[path] = RowwiseParallel() if name == "linear_o" else ColwiseParallel()
    for name in shared:  # one key and value head for all: each process's gradient is a part of theirs
        getattr(module, name).register_forward_hook(lambda _, __, out: summed_backward(out, mesh))
    return parallelize_module(module, mesh, plan)


def summed_backward(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def bias_at(arguments: tuple[Tensor | None, ...]) -> int | None:
    """Where the bias with a dimension of heads stands."""
    return 3 if len(arguments) == 4 and arguments[3] is not None else None


def compare(name: str, rank: int, mesh: DeviceMesh) -> list[str]:
    """How the split module differs from the whole one, in the result, the gradients or the parameters."""
    plain, module = modules.make(name), split(modules.make(name), mesh)
    parameters = dict(module.named_parameters())
    wrong = []
    for arguments in modules.calls(name):
        expected, grads = modules.results(plain, list(plain.parameters()), arguments)
        place, mine = bias_at(arguments), slice(rank * modules.HEADS // PROCESSES, (rank + 1) * modules.HEADS // PROCESSES)

        def call(*given: Tensor | None, place: int | None = place, mine: slice = mine) -> Tensor:
            return module(*(x[mine] if i == place and x is not None else x for i, x in enumerate(given)))

        out, found = modules.results(call, list(parameters.values()), arguments)
        if place is not None:
            dist.all_reduce(found[-1])  # each process has the gradient of its heads
        leaves = [*parameters, *(f"argument {i}" for i, x in enumerate(arguments) if x is not None and x.requires_grad)]
        for what, a, b in zip(["out", *leaves], [out, *found], [expected, *grads], strict=True):
            a = whole(a)
            if b.abs().max() == 0 or not torch.allclose(a, b, rtol=1e-9, atol=1e-11):
                wrong.append(f"{what} by {(a - b).abs().max().item():.1e} of {b.abs().max().item():.1e}")
    return wrong


def message_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What calls say whose heads are not those of the process."""
    q_data, m_data, mask, bias = modules.calls("self-attention")[0]
    by_head = mask.unsqueeze(-3).expand(-1, modules.HEADS, -1, -1)
    module = lambda *leave: split(modules.make("self-attention"), mesh, leave)  # noqa: E731
    row, msa = split(modules.make("row attention"), mesh, ("pair_bias",)), modules.calls("row attention")[0]
    return {
        "bias": message_of(lambda: module()(q_data, m_data, None, bias)),
        "mask": message_of(lambda: module()(q_data, m_data, by_head, None)),
        "key": message_of(lambda: module("linear_q", "linear_g")(q_data, m_data, mask, None)),
        "pair bias": message_of(lambda: row(*msa)),
    }


def resets(mesh: DeviceMesh) -> dict[str, Tensor]:
    module = split(modules.make("self-attention"), mesh)
    for layer in module.children():
        layer.reset_parameters()
    return {name: whole(parameter.detach()) for name, parameter in module.named_parameters()}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of this machine need not resolve
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        results = {
            "differences": {name: compare(name, rank, mesh) for name in modules.MODULES},
            "refusals": refusals(mesh),
            "resets": resets(mesh),
        }
    finally:
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")
