# SPDX-License-Identifier: BSD-3-Clause
"""The table and the plot of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display needed
import matplotlib.pyplot as plt

from .agreement import Check, largest_loss_difference
from .train import Run

LABELS = {"plain": "plain PyTorch", "operator": "torch_gated_attn"}
COLORS = {"plain": "#b8bfc6", "operator": "#0b6e99"}


def print_table(runs: Sequence[Run], checks: Sequence[Check], baseline: float) -> None:
    def row(label: str, form: str, values: Sequence[float | None], note: str | None = None) -> list[str]:
        known = [value for value in values if value is not None]
        if note is None:
            note = f"{known[0] / known[1]:.2f}" if len(known) == 2 else ""
        return [label, *("unknown" if value is None else form.format(value) for value in values), note]

    _print_aligned(
        [
            ["", *(LABELS[run.name] for run in runs), "plain / ours"],
            row("time per step, median", "{:.3f} s", [run.median_seconds for run in runs]),
            row("peak extra memory of a step", "{:.0f} MiB", [run.step_mib for run in runs]),
            row("loss, first step", "{:.4f}", [run.losses[0] for run in runs], ""),
            row("loss, last step", "{:.4f}", [run.losses[-1] for run in runs], ""),
            row("held-out accuracy", "{:.1%}", [run.accuracy for run in runs], f"column majority {baseline:.1%}"),
        ]
    )
    print()
    results = [[c.claim, c.measured, c.limit, "ok" if c.passed else "VIOLATED"] for c in checks]
    _print_aligned([["check", "measured", "limit", ""], *results])


def _print_aligned(rows: Sequence[Sequence[str]]) -> None:
    first, *others = (max(len(cell) for cell in column) for column in zip(*rows, strict=True))
    for i, row in enumerate(rows):
        cells = [row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))]
        print("  ".join(cells).rstrip())
        if i == 0:
            print("-" * (first + sum(others) + 2 * len(others)))


def write_plot(runs: Sequence[Run], path: Path, subtitle: str) -> None:
    figure, (curve, seconds, memory) = plt.subplots(1, 3, figsize=(11, 4.2), width_ratios=[2.6, 1, 1], layout="constrained")
    plain, fused = runs
    steps = range(1, len(plain.losses) + 1)
    curve.plot(steps, plain.losses, color=COLORS[plain.name], linewidth=6, label=LABELS[plain.name], solid_capstyle="round")
    curve.plot(steps, fused.losses, color=COLORS[fused.name], linewidth=1.5, label=LABELS[fused.name])
    curve.set(
        xlabel="training step",
        ylabel="cross-entropy of the hidden residues",
        title=f"Loss: the runs differ by at most {largest_loss_difference(runs):.0e} of it",
    )
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.legend(frameon=False)
    curve.grid(alpha=0.3)
    _bars(seconds, runs, [run.median_seconds for run in runs], "Time per step, median (s)", "{:.2f}")
    _bars(memory, runs, [run.step_mib for run in runs], "Peak extra memory (MiB)", "{:.0f}")
    for axes in (curve, seconds, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Small Evoformer on Pfam PF00069 (protein kinases): {subtitle}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Any, runs: Sequence[Run], values: Sequence[float | None], title: str, form: str) -> None:
    known = [0.0 if value is None else value for value in values]
    bars = axes.bar(["plain\nPyTorch", "torch_\ngated_attn"], known, color=[COLORS[run.name] for run in runs], width=0.65)
    axes.bar_label(bars, ["not known" if value is None else form.format(value) for value in values], padding=3)
    axes.margins(y=0.12)
    axes.set_title(f"{title}\nratio {known[0] / known[1]:.1f}" if all(known) else title, fontsize=11)
