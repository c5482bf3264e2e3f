# SPDX-License-Identifier: BSD-3-Clause
"""One figure of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display needed
import matplotlib.pyplot as plt
from report import COLORS
from share import Share

from torch_gated_attn._bench.comparison import Comparison


def write_plot(
    path: Path, machine: Mapping[str, Any], comparisons: list[Comparison], shares: list[Share], memory: Mapping[str, Any]
) -> None:
    directions = list(dict.fromkeys(comparison.direction for comparison in comparisons))
    rows = len({comparison.workload for comparison in comparisons})
    panels = len(directions) + bool(shares) + bool(memory)
    if not panels:
        return
    figure, axes = plt.subplots(
        1, panels, figsize=(4 * panels, max(4, 0.42 * rows + 1.5)), squeeze=False, layout="constrained"
    )
    remaining = iter(axes[0])
    for direction in directions:
        _ratios(next(remaining), [c for c in comparisons if c.direction == direction], direction)
    if shares:
        _shares(next(remaining), shares)
    if memory:
        _memory(next(remaining), memory)
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
    torch_version = machine["versions"]["torch"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    if machine["gpu"]:
        where = machine["gpu"]["name"]
    figure.suptitle(f"{where}, torch {torch_version}, {machine['date'][:10]}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _ratios(axes: Any, comparisons: list[Comparison], direction: str) -> None:
    names = list(dict.fromkeys(c.workload for c in comparisons))
    dtypes = list(dict.fromkeys(c.dtype for c in comparisons))
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        chosen = [c for c in comparisons if c.dtype == dtype]
        places = [names.index(c.workload) + (i - (len(dtypes) - 1) / 2) * height for c in chosen]
        bars = axes.barh(places, [c.ratio() for c in chosen], height * 0.92, color=COLORS[dtype], label=dtype)
        axes.bar_label(bars, [f"{c.ratio():.1f}" for c in chosen], padding=2, fontsize=8)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set(
        xscale="log",
        yticks=range(len(names)),
        yticklabels=names,
        title=direction,
        xlabel="time of the fastest peer / ours",
    )
    ratios = [c.ratio() for c in comparisons if c.fastest_peer()]
    limits = min(0.5, 0.8 * min(ratios)), max(2, 1.6 * max(ratios))  # room for the numbers beside the bars
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if limits[0] <= tick <= limits[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(limits)
    axes.set_ylim(len(names) + 0.2, -0.6)  # the first workload on top, and below the last one a line for the legend
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)


def _shares(axes: Any, shares: list[Share]) -> None:
    for dtype in dict.fromkeys(s.dtype for s in shares):
        for direction, style in (("forward", "-o"), ("backward", "--s")):
            chosen = [s for s in shares if (s.dtype, s.direction) == (dtype, direction)]
            label = f"{dtype} {direction} ({chosen[0].instruction})"
            axes.plot(
                [s.head_dim for s in chosen], [100 * s.share for s in chosen], style, color=COLORS[dtype], label=label
            )
    axes.set_xscale("log", base=2)
    head_dims = sorted({s.head_dim for s in shares})
    axes.set_xticks(head_dims, [str(d) for d in head_dims])
    axes.set(ylim=(0, 100), xlabel="head_dim (Q = K = 256)", ylabel="%", title="share of one core's peak")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _memory(axes: Any, memory: Mapping[str, Any]) -> None:
    bars = axes.bar(list(memory["paths"]), list(memory["paths"].values()), color="#b8bfc6", width=0.65)
    bars[0].set_color(COLORS["float32"])
    axes.bar_label(bars, [f"{mib:.0f}" for mib in memory["paths"].values()], padding=3)
    axes.axhline(memory["needed"], color="#444444", linewidth=1, linestyle="--", label="out + lse + gradients")
    axes.margins(y=0.2)  # room for the legend
    axes.set(ylabel="MiB", title=f"peak extra memory, {memory['workload']} step")
    axes.legend(frameon=False, fontsize=8)
