# SPDX-License-Identifier: BSD-3-Clause
"""The command line: one module per subcommand, which adds its parser and sets `run`, a function of the parsed arguments
that returns the exit code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from .. import __version__
from . import selftest

COMMANDS = (selftest,)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_gated_attn", description="Gated attention for PyTorch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    parsed = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = parsed.run
    return run(parsed)
