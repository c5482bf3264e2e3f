# SPDX-License-Identifier: BSD-3-Clause
"""`<!-- benchmark tables -->` stands for a table of every file in benchmarks/results that compares paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
MARKER = "<!-- benchmark tables -->"
NAMES = {"operator": "operator", "eager": "plain PyTorch", "sdpa": "SDPA", "compile": "`torch.compile`"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    if MARKER not in markdown:
        return markdown
    documents = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    tables = [_table(name, found) for name, found in documents.items() if "comparisons" in found]
    return markdown.replace(MARKER, "\n\n".join(tables))


def _table(name: str, document: dict[str, Any]) -> str:
    machine, rows = document["machine"], document["comparisons"]
    paths = list(dict.fromkeys(path for row in rows for path in row["paths"]))
    lines = [
        f"### {name}",
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"torch {machine['versions']['torch']}, {machine['date'][:10]}, commit {machine['commit']}. "
        "Minimum of the runs in ms; the last column is the fastest peer over the operator.",
        "",
        "| | | | " + " | ".join(NAMES[path] for path in paths) + " | times faster |",
        "|---|---|---|" + "---:|" * (len(paths) + 1),
    ]
    for row in rows:
        times = [row["paths"].get(path, {}).get("min") for path in paths]
        cells = ["failed" if time is None else f"{1e3 * time:.2f}" for time in times]
        head = f"| {row['workload']} | {row['dtype']} | {row['direction']} | "
        lines.append(head + " | ".join(cells) + f" | {row['ratio_min']:.1f} |")
    return "\n".join(lines)
