# SPDX-License-Identifier: BSD-3-Clause
"""The Python examples of the README and of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run_example(page: str, block: str) -> dict[str, Any]:
    """Runs it and returns its variables."""
    namespace = {"__name__": "example"}
    exec(compile(block, page, "exec"), namespace)
    return namespace


def is_for_several_processes(page: str) -> bool:
    """Its blocks are one program that torchrun starts, so test_distributed_docs.py runs them."""
    return page == "docs/distributed.md"


def makes_package(block: str) -> bool:
    """Compiling a package takes long, so test_deployment.py runs that example, and uses what it makes."""
    return "aoti_compile_and_package" in block
