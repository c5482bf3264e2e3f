# SPDX-License-Identifier: BSD-3-Clause
"""The table and the plot of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .agreement import Check
from .train import Run

LABELS = {"plain": "plain PyTorch", "operator": "torch_gated_attn"}
COLORS = {"plain": "#b8bfc6", "operator": "#0b6e99"}


def print_table(runs: Sequence[Run], checks: Sequence[Check], baseline: float) -> None:
    plain, fused = runs
    rows = [("", *(LABELS[run.name] for run in runs), "plain / ours")]
    rows.append(("time per step, median", *(f"{run.median_seconds:.3f} s" for run in runs),
                 f"{plain.median_seconds / fused.median_seconds:.2f}"))  # fmt: skip
    if plain.step_mib is not None and fused.step_mib is not None:
        rows.append(("peak extra memory of a step", *(f"{run.step_mib:.0f} MiB" for run in runs),
                     f"{plain.step_mib / fused.step_mib:.2f}"))  # fmt: skip
    rows.append(("loss, first step", *(f"{run.losses[0]:.4f}" for run in runs), ""))
    rows.append(("loss, last step", *(f"{run.losses[-1]:.4f}" for run in runs), ""))
    rows.append(("held-out accuracy", *(f"{run.accuracy:.1%}" for run in runs), f"column majority {baseline:.1%}"))
    _print_aligned(rows)
    print()
    _print_aligned([("check", "measured", "limit", "")]
                   + [(c.claim, c.measured, c.limit, "ok" if c.passed else "VIOLATED") for c in checks])  # fmt: skip


def _print_aligned(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for i, row in enumerate(rows):
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip())
        if i == 0:
            print("-" * (sum(widths) + 2 * (len(widths) - 1)))


def write_plot(runs: Sequence[Run], path: Path, subtitle: str) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    figure, (curve, seconds, memory) = plt.subplots(1, 3, figsize=(11, 4.2), width_ratios=[2.6, 1, 1], layout="constrained")
    plain, fused = runs
    steps = range(1, len(plain.losses) + 1)
    curve.plot(steps, plain.losses, color=COLORS[plain.name], linewidth=6, label=LABELS[plain.name], solid_capstyle="round")
    curve.plot(steps, fused.losses, color=COLORS[fused.name], linewidth=1.5, label=LABELS[fused.name])
    curve.set(xlabel="training step", ylabel="cross-entropy of the hidden residues", title="Loss: the two runs coincide")
    curve.legend(frameon=False)
    curve.grid(alpha=0.3)
    _bars(seconds, runs, [run.median_seconds for run in runs], "Time per step (s)", "{:.2f}")
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
    axes.margins(y=0.15)
    axes.set_title(title, fontsize=11)
    if all(known):
        axes.text(0.97, 0.93, f"{known[0] / known[1]:.1f}x less", transform=axes.transAxes, ha="right",
                  weight="bold", color=COLORS["operator"])  # fmt: skip
