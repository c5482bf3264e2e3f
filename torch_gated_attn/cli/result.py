# SPDX-License-Identifier: BSD-3-Clause
"""What `bench` found out about one shape, as JSON and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .._bench.comparison import Comparison
from .._bench.workloads import Workload

PATHS = {
    "operator": "torch_gated_attn",
    "eager": "plain PyTorch",
    "sdpa": "SDPA",
    "sdpa_efficient": "SDPA efficient",
    "sdpa_cudnn": "SDPA cuDNN",
    "flex": "FlexAttention",
    "trifast": "trifast",
    "compile": "torch.compile",
}


@dataclasses.dataclass
class Result:
    """One workload and dtype."""

    workload: Workload
    dtype: str
    comparisons: list[Comparison]  # one of each direction
    memory_mib: dict[str, float | str]  # of a step by path, or why it could not be measured
    needed_mib: float

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": dataclasses.asdict(self.workload),
            "dtype": self.dtype,
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "memory_mib": {"needed": self.needed_mib, "paths": self.memory_mib},
        }


def result_table(result: Result) -> Table:
    """A row for each path; "x" is its time over the operator's."""
    w = result.workload
    kind = "gated" if w.gated else "no gate"
    caption = f"Fastest of the turns; {kind}, the mask hides a tenth of the keys."
    if result.memory_mib:
        # Less than the results where they fit into memory that the process already has.
        caption += f" Memory: how far a step raises the peak; its results and gradients have {result.needed_mib:.1f} MiB."
    table = Table(
        title=f"{w.name}: {w.title}\n{result.dtype}, {w.describe()}",
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
    )
    table.add_column("")
    for comparison in result.comparisons:
        table.add_column(f"{comparison.direction}\nms", justify="right")
        table.add_column("\nx", justify="right")
    if result.memory_mib:
        table.add_column("memory\nMiB", justify="right")
    for path in result.comparisons[0].timings:
        cells = [PATHS[path]]
        for comparison in result.comparisons:
            cells += _time(comparison, path)
        if result.memory_mib:
            used = result.memory_mib[path]
            cells.append("failed" if isinstance(used, str) else f"{used:.1f}")
        table.add_row(*cells, style="bold" if path == "operator" else "")
    errors = [(path, t.error) for c in result.comparisons for path, t in c.timings.items() if t.error]
    errors += [(path, used) for path, used in result.memory_mib.items() if isinstance(used, str)]
    for path, error in errors:
        table.caption = f"{table.caption}\n{PATHS[path]}: {escape(error)}"
    return table


def _time(comparison: Comparison, path: str) -> list[str]:
    timing, ours = comparison.timings[path], comparison.timings["operator"]
    if timing.error:
        return ["failed", ""]
    return [f"{timing.best * 1e3:.2f}", f"{timing.best / ours.best:.1f}"]


def workload_table(workloads: list[Workload]) -> Table:
    table = Table("", "shape", "dtypes", "what", box=box.SIMPLE_HEAD)
    for w in workloads:
        table.add_row(w.name, w.describe(), ", ".join(w.dtypes), w.title)
    return table
