# SPDX-License-Identifier: BSD-3-Clause
"""Prints the packages of extras of pyproject.toml, quoted for a shell: pip would build the library before `.[extra]`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, whose pip has a copy
    from pip._vendor import tomli as tomllib

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def packages(extra: str) -> set[str]:
    found: set[str] = set()
    for requirement in EXTRAS[extra]:
        own = re.fullmatch(r"torch-gated-attn\[(.+)\]", requirement)
        found |= {p for name in own[1].split(",") for p in packages(name.strip())} if own else {requirement}
    return found


print(shlex.join(sorted({package for extra in sys.argv[1:] for package in packages(extra)})))
