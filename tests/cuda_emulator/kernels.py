# SPDX-License-Identifier: BSD-3-Clause
"""The kernels in an emulator library and those a call launched, by their demangled names."""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

# By their numbers in the sources.
ACCESS, DTYPES = ("no bias", "half bias", "float bias", "general"), ("fp32", "fp64", "bf16", "fp16")


class Kernel(NamedTuple):
    dtype: str
    head_dim: int  # 0: any
    variant: str  # "forward, half bias, shared"


class Tile(NamedTuple):
    """Pairs that a kernel computed at once, of one batch entry and query head."""

    entry: int
    head: int
    query: int
    queries: int
    key: int
    keys: int
    masked: bool  # with a look at each pair
    kernel: Kernel


def parse_tiles(lines: str) -> list[Tile]:
    tiles = []
    for line in lines.splitlines():
        *numbers, symbol = line.split(" ", 7)
        entry, head, query, queries, key, keys, masked = map(int, numbers)
        kernel = parse_one(symbol)
        assert kernel is not None, symbol
        tiles.append(Tile(entry, head, query, queries, key, keys, bool(masked), kernel))
    return tiles


def parse_one(symbol: str) -> Kernel | None:
    found = re.search(r"::(\w+)_kernel<(.*)>\(", symbol)
    if not found:
        return None
    name, arguments = found.groups()
    dtype = re.search(r"DType\)(\d)", arguments)
    access = re.search(r"BiasAccess\)(\d)", arguments)
    numbers = [int(n) for n in re.findall(r"(?<![\w)])(\d+)(?!\w)", arguments)]
    parts = [name.replace("_", " ")]
    if dtype and DTYPES[int(dtype[1])] == "fp32":
        parts.append("tf32")
    if access:
        parts.append(ACCESS[int(access[1])])
    if name == "backward_query" and "true" in arguments:
        parts.append("strip")
    if name == "transpose_bias":
        parts.append("float bias" if "true" in arguments else "half bias")
    if name == "forward" and numbers[4] > 1:  # Tile<type, head_dim, bias, warps, row tiles, block, group, stages>
        parts.append("shared")
    plain = "fp64" if arguments.startswith("double") else "fp32"
    return Kernel(DTYPES[int(dtype[1])] if dtype else plain, numbers[0] if numbers else 0, ", ".join(parts))


def parse(symbols: str) -> set[Kernel]:
    return {kernel for line in symbols.splitlines() if (kernel := parse_one(line))}


def of_library(path: str) -> set[Kernel]:
    """Every kernel that is compiled into it."""
    return parse(subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout)
