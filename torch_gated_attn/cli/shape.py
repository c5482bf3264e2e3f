# SPDX-License-Identifier: BSD-3-Clause
"""The shape that a command is about: workloads by name, or one from options."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated

import typer

from .._bench.workloads import DTYPES, Workload, load

LARGEST = 2**59  # elements of a tensor: their bytes are a 64-bit number, in any dtype


class Bias(str, Enum):
    shared = "shared"  # [1, ..., H, Q, K], as the pair bias of every row of an alignment
    full = "full"  # [*, H, Q, K]
    none = "none"


Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="WORKLOAD", help="Named workloads, such as T1 R1; `bench --list` has them."),
]
Batch = Annotated[str | None, typer.Option(help="Batch dimensions, such as 64 or 4x24.", show_default="16")]
Heads = Annotated[int | None, typer.Option(min=1, help="Heads.", show_default="4")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Key/value heads.", show_default="as --heads")]
Queries = Annotated[int | None, typer.Option("--q", min=1, help="Queries.", show_default="256")]
Keys = Annotated[int | None, typer.Option("--k", min=1, help="Keys.", show_default="as --q")]
HeadDim = Annotated[int | None, typer.Option(min=1, help="Size of a head.", show_default="32")]
BiasOption = Annotated[Bias | None, typer.Option(help="Pair bias, with a gradient.", show_default="shared")]
Gate = Annotated[bool | None, typer.Option("--gate/--no-gate", help="A sigmoid gate.", show_default="gate")]
Dtypes = Annotated[
    list[str] | None, typer.Option("--dtype", help=f"{', '.join(DTYPES)}; may be repeated.", show_default="float32")
]


def workloads(
    names: list[str] | None,
    batch: str | None,
    heads: int | None,
    kv_heads: int | None,
    queries: int | None,
    keys: int | None,
    head_dim: int | None,
    bias: Bias | None,
    gate: bool | None,
    device: str = "cpu",
) -> list[Workload]:
    """Those named, or the one that the options describe. A mask hides a tenth of the keys of each batch row.

    Named workloads have their full batch except on the device "cpu".
    """
    options = (batch, heads, kv_heads, queries, keys, head_dim, bias, gate)
    if names:
        if any(option is not None for option in options):
            raise typer.BadParameter("give the names of workloads or the options of a shape, not both")
        known = {workload.name: workload for workload in load(batch_key="cpu_batch" if device == "cpu" else "batch")}
        if unknown := [name for name in names if name not in known]:
            raise typer.BadParameter(f"workloads must be among {', '.join(known)}, but are {', '.join(unknown)}")
        return [known[name] for name in names]
    heads, queries, head_dim = heads or 4, queries or 256, head_dim or 32
    sizes, key_heads, keys = _batch("16" if batch is None else batch), kv_heads or heads, keys or queries
    if heads % key_heads:
        raise typer.BadParameter(f"--kv-heads must divide --heads {heads}, but is {key_heads}")
    largest = math.prod(sizes) * heads * max(queries, keys) * max(queries, keys, head_dim)
    if largest > LARGEST:
        raise typer.BadParameter(f"the shape must have at most {LARGEST} scores, but has {largest}")
    scores = [heads, queries, keys]
    biases = {Bias.shared: [1] * len(sizes) + scores, Bias.full: sizes + scores, Bias.none: None}
    return [
        Workload(
            name="yours",
            title="shape of the options",
            batch=sizes,
            heads=heads,
            kv_heads=key_heads,
            q_len=queries,
            k_len=keys,
            head_dim=head_dim,
            bias_shape=biases[bias or Bias.shared],
            mask_shape=[*sizes, 1, 1, keys],
            gated=gate is not False,
            fully_masked=False,
            dtypes=list(DTYPES),
        )
    ]


def dtypes(names: list[str] | None) -> list[str]:
    chosen = names or ["float32"]
    if unknown := [name for name in chosen if name not in DTYPES]:
        raise typer.BadParameter(f"--dtype must be among {', '.join(DTYPES)}, but is {', '.join(unknown)}")
    return chosen


def _batch(text: str) -> list[int]:
    parts = text.split("x")
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--batch must be sizes separated by x, such as 64 or 4x24, but is {text}")
    return [int(part) for part in parts]
