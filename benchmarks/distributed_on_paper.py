# SPDX-License-Identifier: BSD-3-Clause
"""What docs/distributed.md says of many GPUs, from its formulas: no measurement.

One node of triangle attention, C channels, H heads, in bfloat16, forward and backward, on P GPUs, 8 to a machine.
Assumed: 450 GB/s one way for a GPU inside a machine, 50 GB/s for a GPU's own network card, 300 TFLOP/s in attention and 500
in projections; a backward costs 2.5 times the forward in attention and twice in projections.

    python benchmarks/distributed_on_paper.py
"""

from __future__ import annotations

import math

CHANNELS, HEADS, BYTES = 128, 4, 2
LINK, CARD, MACHINE = 450e9, 50e9, 8
ATTENTION, PROJECTION = 300e12, 500e12
MEMORY, BLOCKS = 72e9, 48  # of a GPU of 80 GB; checkpointed blocks
WAYS = ("axial", "grid")


def machines(gpus: int) -> int:
    return max(1, gpus // MACHINE)


def gathered(size: float, gpus: int) -> float:
    """Seconds of an all_gather to, or a reduce_scatter from, `size` bytes on every GPU; a machine shares its cards."""
    m = machines(gpus)
    return max(size * (gpus - 1) / gpus / LINK, size * (m - 1) / m / (CARD * MACHINE))


def turned(size: float, gpus: int) -> float:
    """Seconds of an all_to_all of `size` bytes a GPU."""
    m = machines(gpus)
    return size / gpus * (min(gpus, MACHINE) - 1) / LINK + size * (m - 1) / m / CARD


def computing(tokens: int, gpus: int) -> tuple[float, float]:
    """Seconds forward and backward."""
    attention, projections = 4 * tokens**3 * CHANNELS / gpus, 10 * tokens**2 * CHANNELS**2 / gpus
    forward = attention / ATTENTION + projections / PROJECTION
    return forward, 2.5 * attention / ATTENTION + 2 * projections / PROJECTION


def seconds(tokens: int, gpus: int, way: str) -> float:
    tile, bias = BYTES * tokens**2 * CHANNELS / gpus, BYTES * tokens**2 * HEADS
    if way == "axial":  # the gradient of the bias is scattered in float32; the pair representation is turned each way
        return sum(computing(tokens, gpus)) + gathered(bias, gpus) + gathered(2 * bias, gpus) + 2 * turned(tile, gpus)
    side = round(gpus**0.5)
    ring = 2 * tile * (side - 1), 2 * tile * (side - 1) + (4 * tile * side if side > 1 else 0)  # dk, dv in float32
    rest = bias / gpus + bias / side, bias / gpus + 2 * bias / side
    mirror = tile / CARD if machines(gpus) > 1 else 0.0  # the ending node's tiles, so that its ring stays in a machine
    slow = LINK if machines(gpus) == 1 else CARD
    both = zip(computing(tokens, gpus), ring, rest, strict=True)
    return sum(max(c, travels / LINK) + r / slow + mirror for c, travels, r in both)


def efficiency(tokens: int, gpus: int, way: str) -> float:
    return sum(computing(tokens, gpus)) / seconds(tokens, gpus, way)


def working_set(tokens: int, gpus: int, way: str) -> float:
    """Bytes of one node with its backward: pair representation, norm, five projections and gradients in tiles, and bias."""
    tile, bias = BYTES * tokens**2 * CHANNELS / gpus, BYTES * tokens**2 * HEADS
    return 12 * tile + 3 * bias if way == "axial" else 24 * tile + 3 * bias / math.sqrt(gpus)


def largest(gpus: int, way: str, blocks: int) -> int:
    """Tokens that fit, in steps of 256: one node and what `blocks` checkpoints keep."""
    tokens = 256
    while working_set(tokens + 256, gpus, way) + blocks * BYTES * (tokens + 256) ** 2 * CHANNELS / gpus < MEMORY:
        tokens += 256
    return tokens


def tables() -> str:
    """As they stand in docs/distributed.md."""
    gpus = (16, 64, 256)
    head = [f"{way}, {p} GPUs" for way in WAYS for p in gpus]
    lines = ["| tokens | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for tokens in (4096, 8192, 16384):
        cells = [f"{100 * efficiency(tokens, p, way):.0f} %" for way in WAYS for p in gpus]
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    lines += ["", "| GPUs | axial: inference | training | grid: inference | training |", "|---|---|---|---|---|"]
    for p in (1, 4, 16, 64, 256):
        cells = [str(largest(p, way, blocks)) for way in WAYS for blocks in (0, BLOCKS)]
        lines.append(f"| {p} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
