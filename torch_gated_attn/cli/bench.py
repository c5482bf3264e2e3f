# SPDX-License-Identifier: BSD-3-Clause
"""`bench`: the operator beside plain PyTorch, SDPA and torch.compile on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .._bench import machine, memory, peers
from .._bench.comparison import compare
from .._bench.measure import DIRECTIONS
from .._bench.workloads import DTYPES, Workload, load, make_inputs
from . import shape
from .result import PATHS, Result, result_table, workload_table


def bench(
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
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeat: Annotated[int, typer.Option(min=1, help="Timed turns of each path.")] = 7,
    path_limit: Annotated[float, typer.Option(help="Seconds after which a path gets no third turn.")] = 20.0,
    with_compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory of a step.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every time to this file.")] = None,
    png_file: Annotated[Path | None, typer.Option("--png", help="Write a plot to this file (needs matplotlib).")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the named workloads and exit.")] = False,
) -> None:
    """Time and memory of your shape, or of named workloads, against what PyTorch offers on this machine."""
    console = Console(highlight=False)
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, but is {device}")
    if device == "cuda" and (missing := machine.why_no_gpu()):
        raise typer.BadParameter(f"--device cuda needs {missing}")
    if not path_limit > 0:  # nan too
        raise typer.BadParameter(f"--path-limit must be a positive number of seconds, but is {path_limit}")
    # What cannot be written is said before anything is measured.
    _check_file("--json", json_file)
    _check_file("--png", png_file)
    if png_file is not None:
        plot = _plot()
        plot.check_format(png_file)
    cases = [
        (workload, name)
        for workload in shape.workloads(names, batch, heads, kv_heads, q, k, head_dim, bias, gate, device)
        for name in shape.dtypes(dtype)
    ]
    if show_list:
        console.print(workload_table(load()))
        return
    facts = machine.describe(device)
    processor = facts["cpu"] if device == "cpu" else facts["gpu"]["name"]
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    about = f"{processor}, {threads}, {facts['instruction_set']}" if device == "cpu" else processor
    about += f", torch {facts['versions']['torch']}"
    console.print(about)
    paths = list(peers.paths(with_compile, device))
    results = []
    for workload, name in cases:
        with _progress(len(paths) * (len(DIRECTIONS) * (1 + repeat) + with_memory)) as progress:
            results.append(_measure(workload, name, device, paths, repeat, path_limit, with_memory, progress))
        console.print(result_table(results[-1]))
    if json_file is not None:
        document = {"machine": facts, "device": processor, "results": [result.as_json() for result in results]}
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    if png_file is not None:
        plot.write(png_file, about, results)
    for file in filter(None, (json_file, png_file)):
        console.print(f"wrote {file}")


def _check_file(option: str, file: Path | None) -> None:
    if file is None:
        return
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise typer.BadParameter(f"{option} must be a file that can be written, but is {str(file)!r}")


def _plot() -> ModuleType:
    try:
        from . import plot
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f'--png needs {error.name}: pip install "torch-gated-attn[cli]"') from error
    return plot


def _measure(
    workload: Workload,
    dtype: str,
    device: str,
    names: list[str],
    repeat: int,
    path_limit: float,
    with_memory: bool,
    progress: Progress,
) -> Result:
    (task,) = progress.task_ids

    def step(what: str) -> None:
        progress.update(task, advance=1, description=f"{workload.name} {dtype} {what}")

    def timing(direction: str) -> Callable[[str], None]:
        return lambda name: step(f"{direction}: {PATHS[name]}")

    comparisons = []
    try:
        inputs = make_inputs(workload, DTYPES[dtype], device=device)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise typer.BadParameter(f"{workload.name} in {dtype} must fit into the memory of {device}, but: {said}") from error
    for direction in DIRECTIONS:
        comparisons.append(
            compare(
                workload,
                dtype,
                direction,
                peers.paths("compile" in names, device),
                inputs,
                repeat=repeat,
                path_limit=path_limit,
                before=timing(direction),
            )
        )
    used: dict[str, float | str] = {}
    for name in names if with_memory else []:
        step(f"memory: {PATHS[name]}")
        try:
            used[name] = memory.measure(name, workload, dtype, device)
        except RuntimeError as error:  # a path that cannot run this workload is a finding
            used[name] = str(error)
    return Result(workload, dtype, comparisons, used, memory.needed_mib(workload, dtype))


def _progress(steps: int) -> Progress:
    # On stderr, so that a table in a pipe stays a table.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.add_task("starting", total=steps)
    return progress
