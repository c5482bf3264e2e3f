# SPDX-License-Identifier: BSD-3-Clause
"""docs/reliability.md lists every class of failure, and the tests it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "reliability.md").read_text()
CLASSES = [
    *range(1, 15),
    *range(16, 44),
    45,
    46,
    47,
    *range(50, 64),
    65,
    66,
    *range(67, 79),
    *range(80, 84),
    86,
    87,
    88,
    90,
    94,
]
ROWS = {int(number): row for row in TABLE.splitlines() if (number := row.split(" | ")[0].removeprefix("| ")).isdigit()}


def functions(file: str) -> set[str]:
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_class_is_listed_once_in_order():
    assert len(CLASSES) == 82
    assert list(ROWS) == CLASSES
    assert len(re.findall(r"^\| \d+ \|", TABLE, re.MULTILINE)) == len(CLASSES)


def test_every_named_test_exists():
    missing = []
    for number, row in ROWS.items():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, f"class {number} names no test"
        assert row.count("::") == len(named)
        missing += [f"{file}::{name}" for file, name in named if name not in functions(file)]
    assert not missing
