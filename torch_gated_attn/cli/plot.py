# SPDX-License-Identifier: BSD-3-Clause
"""The figure of `bench --png`: times and memory of every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import typer

matplotlib.use("Agg")  # before pyplot: no display needed
import matplotlib.pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

from .result import PATHS, Result

OTHER = "#b8bfc6"
COLORS = {"operator": "#0b6e99", "sdpa": "#8c959d", "compile": "#e08e45"}


def check_format(file: Path) -> None:
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in known:
        raise typer.BadParameter(f"--png must end in one of {', '.join(known)}, but is {str(file)!r}")


def write(file: Path, about: str, results: list[Result]) -> None:
    """A row of panels for each result: the two directions, then memory."""
    panels = len(results[0].comparisons) + bool(results[0].memory_mib)
    figure, axes = plt.subplots(
        len(results), panels, figsize=(3.6 * panels, 2.1 * len(results) + 0.6), squeeze=False, layout="constrained"
    )
    for row, result in zip(axes, results, strict=True):
        for panel, comparison in zip(row, result.comparisons, strict=False):
            times = {path: 1e3 * timing.best for path, timing in comparison.timings.items() if not timing.error}
            _bars(panel, times, f"{result.workload.name} {result.dtype}, {comparison.direction}", "ms")
        if result.memory_mib:
            used = {path: mib for path, mib in result.memory_mib.items() if not isinstance(mib, str)}
            _bars(row[-1], used, f"{result.workload.name} {result.dtype}, memory of a step", "MiB")
    figure.suptitle(about, fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _bars(axes: Any, values: dict[str, float], title: str, unit: str) -> None:
    names, colors = [PATHS[path] for path in values], [COLORS.get(path, OTHER) for path in values]
    bars = axes.barh(names, list(values.values()), color=colors, height=0.65)
    axes.bar_label(
        bars, [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values.values()], padding=3, fontsize=8
    )
    axes.invert_yaxis()  # the operator on top
    axes.margins(x=0.2)  # room for the numbers
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
