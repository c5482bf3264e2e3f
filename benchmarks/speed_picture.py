# SPDX-License-Identifier: BSD-3-Clause
"""The plot of the README: a training step's time and memory beside plain PyTorch, SDPA and torch.compile, as SVG."""

from __future__ import annotations

import sys

from measured import ROOT, WORKLOADS, Document, comparisons, having, model_rows, settings_and_days

sys.path.insert(0, str(ROOT / "docs/pictures"))  # which is no package
from canvas import Picture

SHOWN = ("T1", "R1", "X1", "C1", "P1", "D1")
MARKS = {"sdpa": "bias", "compile": "key"}
LEFT, UNIT, NUMBERS = 240, 230, 526  # the axis of the times: 0, width of plain PyTorch's bar, and where numbers begin


def draw() -> str:
    chosen = comparisons()[0]
    rows = [chosen[code, "float32", "forward+backward"] for code in SHOWN]
    memory = having("memory_mib")[0]
    block_document, block = next(pair for pair in model_rows() if pair[1]["model"] == "evoformer")
    measured = {"Times": [document for document, _ in rows], "Memory": [memory, block_document]}
    notes = [f"{what}, float32: {line}" for what, found in measured.items() for line in settings_and_days(found)]
    spoken = _spoken(rows, memory["memory_mib"])
    picture = Picture(980, 380 + 16 * len(notes), "Time and memory of a training step", spoken)
    _times(picture, [row for _, row in rows])
    _memory(picture, memory["memory_mib"], block)
    for n, note in enumerate(notes):
        picture.text(24, 384 + 16 * n, note, 11, "soft")
    return picture.svg()


def _spoken(rows: list[tuple[Document, Document]], memory: Document) -> str:
    times = [
        f"{WORKLOADS[row['workload']]} {row['ratio_min']:.1f} times as fast as the fastest other path" for _, row in rows
    ]
    used = memory["paths"]
    return f"{', '.join(times)}. Peak memory {used['operator']:.0f} MiB instead of {used['eager']:.0f}."


def _times(picture: Picture, rows: list[Document]) -> None:
    picture.text(24, 34, "Time of a training step, every gradient", 15, bold=True)
    picture.text(24, 56, "plain PyTorch = 1", 12, "soft")
    for x, color, name in ((0, "plain", "plain PyTorch"), (118, "query-ink", "this operator")):
        picture.rect(LEFT + x, 46, 12, 12, color, 2)
        picture.text(LEFT + x + 18, 56, name, 12)
    for x, path, name in ((236, "sdpa", "SDPA"), (294, "compile", "torch.compile")):
        picture.line([(LEFT + x, 45), (LEFT + x, 59)], MARKS[path], 3)
        picture.text(LEFT + x + 8, 56, name, 12)
    for i, row in enumerate(rows):
        y = 78 + 48 * i
        seconds = {path: found["min"] for path, found in row["paths"].items() if "min" in found}  # others failed
        picture.text(LEFT - 10, y + 20, WORKLOADS[row["workload"]], 12.5, anchor="end")
        picture.rect(LEFT, y, UNIT, 30, "plain", 2)
        picture.rect(LEFT, y, UNIT * seconds["operator"] / seconds["eager"], 30, "query-ink", 2)
        for path, color in MARKS.items():
            if path not in seconds:
                continue
            x = LEFT + UNIT * seconds[path] / seconds["eager"]
            picture.line([(x, y - 4), (x, y + 34)], color, 3)
        picture.text(NUMBERS, y + 12, f"{row['ratio_min']:.1f}x the next best", 13, bold=True)
        picture.text(NUMBERS, y + 29, f"{1e3 * seconds['eager']:.0f} to {1e3 * seconds['operator']:.0f} ms", 12, "soft")


def _memory(picture: Picture, memory: Document, block: Document) -> None:
    left, height, floor = 700, 190, 306
    picture.text(left - 10, 34, "Peak extra memory, MiB", 15, bold=True)
    used = memory["paths"]
    columns = [("plain", "PyTorch", used["eager"]), ("bias", "SDPA", used["sdpa"]), ("query-ink", "this", used["operator"])]
    _columns(picture, left, floor, height, columns)
    needed = floor - height * memory["needed"] / max(used.values())
    picture.line([(left - 4, needed), (left + 134, needed)], "gate", 1.5, dashed=True)
    picture.text(left - 10, 56, "dashed: result and gradients, which must be", 11, "gate-ink")
    picture.text(left + 65, floor + 40, "triangle attention,|256 rows of 256", 12, "soft", "middle")
    columns = [("plain", "before", block["original"]["peak_mib"]), ("query-ink", "patched", block["replaced"]["peak_mib"])]
    _columns(picture, left + 178, floor, height, columns)
    picture.text(left + 220, floor + 40, "a whole|Evoformer block", 12, "soft", "middle")


def _columns(picture: Picture, left: float, floor: float, height: float, columns: list[tuple[str, str, float]]) -> None:
    highest = max(mib for _, _, mib in columns)
    for i, (color, name, mib) in enumerate(columns):
        x, tall = left + 46 * i, height * mib / highest
        picture.rect(x, floor - tall, 38, tall, color, 2)
        picture.text(x + 19, floor - tall - 6, f"{mib:.0f}", 12, anchor="middle")
        picture.text(x + 19, floor + 16, name, 11, anchor="middle")
