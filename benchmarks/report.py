# SPDX-License-Identifier: BSD-3-Clause
"""Measurements as a table on the screen, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from share import Share

from torch_gated_attn._bench.comparison import Comparison

COLORS = {"float32": "#0b6e99", "bfloat16": "#e08e45"}


def print_header(machine: Mapping[str, Any], peaks: Mapping[str, float], paths: list[str]) -> None:
    print(f"$ {machine['command']}")
    if gpu := machine["gpu"]:
        print(f"{gpu['name']}, compute capability {gpu['capability']}, CUDA {gpu['cuda']}")
    print(
        f"{machine['cpu']}, {machine['cores']} cores; {machine['threads']} threads; load {machine['load_average'][0]:.2f}"
    )
    print(f"instruction set of the operator: {machine['instruction_set']}; of torch: {machine['torch_cpu_capability']}")
    print(
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + f"; commit {machine['commit']}; {machine['date']}"
    )
    if peaks:
        rates = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in peaks.items() if rate)
        print(f"multiply-add peak of one core, Gflop/s: {rates or 'no measurement for this processor'}")
    cells = "".join(f"{name + ' ms':>20}" for name in paths)
    print(f"\n{'':4} {'':8} {'':16}{cells}   fastest peer / operator")
    print(f"{'':4} {'':8} {'':16}" + f"{'min (median)':>20}" * len(paths) + "   min (median)")


def print_comparison(comparison: Comparison) -> None:
    cells = ""
    for timing in comparison.timings.values():
        cells += f"{'failed':>20}" if timing.error else f"{f'{timing.best * 1e3:.2f} ({timing.middle * 1e3:.2f})':>20}"
    head = f"{comparison.workload:4} {comparison.dtype:8} {comparison.direction:16}"
    print(f"{head}{cells}   {comparison.ratio():.2f}x ({comparison.ratio('middle'):.2f}x) {comparison.fastest_peer()}")
    for name, timing in comparison.timings.items():
        if timing.error:
            print(f"     {name}: {timing.error}")


def print_differences(errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """`errors` is {"T1 float32": {"operator": {"out": difference, "query": ...}}}."""
    for dtype in dict.fromkeys(case.split()[1] for case in errors):
        worst: dict[str, float] = {}
        for case, by_path in errors.items():
            if case.split()[1] == dtype:
                worst |= {name: max(worst.get(name, 0.0), *found.values()) for name, found in by_path.items()}
        cells = ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items())
        print(f"\nlargest difference from float64 relative to the largest element, out and gradients, {dtype}: {cells}")


def print_shares(shares: list[Share]) -> None:
    print("\nshare of one core's peak, one thread, attended keys only, Q = K = 256")
    for s in shares:
        rate, peak = s.flops_per_second / 1e9, s.peak / 1e9
        print(
            f"{s.dtype:8} head_dim {s.head_dim:<3} {s.direction:9} {rate:7.1f} Gflop/s = {s.share:4.0%} of "
            f"{s.instruction} {peak:.0f}"
        )


def print_memory(title: str, needed: float, used: Mapping[str, float]) -> None:
    print(f"\npeak extra memory of a training step, each path in a fresh process: {title}")
    print(f"{'out + lse + gradients':24}{needed:8.0f} MiB")
    for name, mib in used.items():
        print(f"{name:24}{mib:8.0f} MiB = {mib / needed:.2f}x")


def write_json(
    path: Path,
    machine: Mapping[str, Any],
    peaks: Mapping[str, float],
    comparisons: list[Comparison],
    shares: list[Share],
    memory: Mapping[str, Any],
    differences: Mapping[str, Any],
) -> None:
    document = {
        "machine": machine,
        "peak_flops_per_second": peaks,
        "comparisons": [comparison.as_json() for comparison in comparisons],
        "largest_relative_difference_from_float64": differences,
        "shares": [{**dataclasses.asdict(share), "share": share.share} for share in shares],
        "memory_mib": memory,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
