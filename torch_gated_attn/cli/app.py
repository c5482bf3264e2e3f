# SPDX-License-Identifier: BSD-3-Clause
"""The commands and what they have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import selftest as _selftest
from .bench import bench
from .explain import explain
from .info import info

app = typer.Typer(
    name="torch_gated_attn",
    help="Gated attention with a pair bias for PyTorch: what this build is, whether it is right, how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is for a bug report: complete and plain
)


def selftest(
    device: Annotated[str | None, typer.Option(help="This device only, in this process: cpu or cuda:0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --device: print rows of JSON.")] = False,
) -> None:
    """Compare this build with float64 on every instruction set and device here. Exit code 1: it is wrong."""
    known = ["cpu", *_selftest.devices()]
    if device is not None and device not in known:
        raise typer.BadParameter(f"--device must be among {', '.join(known)} on this machine, but is {device!r}")
    if as_json and device is None:
        raise typer.BadParameter("--json needs --device")
    raise typer.Exit(_selftest.run(device, as_json))


for command in (info, selftest, bench, explain):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
