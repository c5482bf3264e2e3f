# SPDX-License-Identifier: BSD-3-Clause
"""`info`: what a bug report should say about the machine and the build."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .._bench import machine

_LEFT_OUT = ("command", "commit", "date", "load_average", "gpu")  # of a measurement, not of a machine


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every fact.")] = False) -> None:
    """Versions, build, devices and instruction set, to paste into a bug report."""
    facts = {name: fact for name, fact in machine.describe().items() if name not in _LEFT_OUT}
    facts["gpus"] = machine.gpus()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _lines(facts):
        table.add_row(name, text)
    Console(highlight=False).print(table)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    build = facts["build"]
    devices = [f"{d['name']}, capability {d['capability']}, {d['memory_mib']} MiB" for d in facts["gpus"]]
    environment = ", ".join(f"{name}={value}" for name, value in facts["environment"].items())
    return [
        *facts["versions"].items(),
        ("built with", f"torch {build['torch']}, {build['compiler']}, CUDA kernels: {build['cuda'] or 'none'}"),
        ("instruction sets", f"{', '.join(build['instruction_sets'])}; in use: {facts['instruction_set']}"),
        ("processor", f"{facts['cpu']}, {facts['cores']} cores, threads of torch: {facts['threads']}"),
        ("CUDA devices", "; ".join(devices) or "none that torch can use"),
        ("system", facts["system"]),
        ("environment", environment or "no variable of TORCH_GATED_ATTN_, OMP_ or MKL_ is set"),
    ]
