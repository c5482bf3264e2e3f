# SPDX-License-Identifier: BSD-3-Clause
"""`explain`: which kernel a shape takes, forward and backward, and why."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import torch_gated_attn

from .._bench.workloads import DTYPES, Workload
from . import shape


def explain(
    names: shape.Names = None,
    batch: shape.Batch = None,
    heads: shape.Heads = None,
    kv_heads: shape.KvHeads = None,
    q: shape.Queries = None,
    k: shape.Keys = None,
    head_dim: shape.HeadDim = None,
    bias: shape.BiasOption = None,
    gate: shape.Gate = None,
    dtype: shape.Dtypes = None,
    device: Annotated[str | None, typer.Option(help="cpu, or an architecture such as sm_90, here or not.")] = None,
) -> None:
    """Which kernel a shape takes, forward and backward, and why. Computes nothing."""
    console = Console(highlight=False)
    device = default_device() if device is None else device
    for workload in shape.workloads(names, batch, heads, kv_heads, q, k, head_dim, bias, gate, device):
        for name in shape.dtypes(dtype):
            console.print(f"[bold]{workload.name}[/] {name}, {workload.describe()}")
            tensors = meta_tensors(workload, DTYPES[name])
            differentiable = [given for given in ("query", "key", "value", "gate", "bias") if tensors[given] is not None]
            table = Table.grid(padding=(0, 2))  # so that a long reason wraps beside its direction
            for direction, grad in (("forward", []), ("backward", differentiable)):
                try:
                    found = torch_gated_attn.explain(**tensors, grad=grad, device=device)
                except ValueError as error:  # a device of another form, or sizes that the operator does not take
                    raise typer.BadParameter(str(error).splitlines()[0]) from error
                facts = "".join(f"\n{fact}: {value}" for fact, value in found.details.items())
                reason = f"{found.device}: [cyan]{found.kernel}[/], {escape(found.reason + facts)}"
                table.add_row("", direction, reason)
            console.print(table)


def default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def meta_tensors(workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a call of this shape, without memory."""
    w = workload
    query, key = [*w.batch, w.heads, w.q_len, w.head_dim], [*w.batch, w.kv_heads, w.k_len, w.head_dim]
    shapes = {"query": query, "key": key, "value": key, "gate": query if w.gated else None, "bias": w.bias_shape}
    tensors = {
        name: None if size is None else torch.empty(size, dtype=dtype, device="meta") for name, size in shapes.items()
    }
    return {**tensors, "mask": torch.empty(w.mask_shape, dtype=torch.bool, device="meta")}
