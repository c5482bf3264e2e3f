# SPDX-License-Identifier: BSD-3-Clause
"""The command line, `python -m torch_gated_attn`. It needs typer and rich, which the library itself does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEEDS = 'the command line needs typer and rich, and {name} is not installed: pip install "torch-gated-attn[cli]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 where the command found something wrong, or 2 where it could not run."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(NEEDS.format(name=missing), file=sys.stderr)
        return 2
    try:
        app(arguments, prog_name="python -m torch_gated_attn")
    except SystemExit as end:  # how typer returns
        return end.code if isinstance(end.code, int) else 0
    return 0
