# SPDX-License-Identifier: BSD-3-Clause
"""Compare the operator with what PyTorch offers, on the shapes that real models run.

Without options every workload of workloads.json that fits a CPU is timed, forward and forward+backward, in float32 and
bfloat16, against plain PyTorch, SDPA and torch.compile; then the share of the core's peak and the memory of a step. On a
GPU, at full batch, also against SDPA's efficient and cuDNN kernels, FlexAttention, and trifast where it is installed.

    python benchmarks/run.py
    python benchmarks/run.py --workloads T1,X1 --dtypes float32 --repeat 5 --no-compile
    python benchmarks/run.py --workloads none --peak --memory
    python benchmarks/run.py --device cuda --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import plot
import report
import torch
from share import Peak, Share, measure_shares

from torch_gated_attn._bench import machine, memory, peers
from torch_gated_attn._bench.comparison import Comparison, compare
from torch_gated_attn._bench.measure import DIRECTIONS, differences
from torch_gated_attn._bench.workloads import DTYPES, WORKLOADS, Workload, load, make_inputs

RESULTS = Path(__file__).with_name("results")
SAMPLE_BATCH = 4  # per batch dimension, for the comparison with float64, whose scores are large
MEMORY_WORKLOAD, MEMORY_DTYPE = "T1", "float32"  # at its full batch, 256


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="all", help="names separated by commas, all (default) or none")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default float32,bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: as torch chooses")
    parser.add_argument("--repeat", type=int, default=7, help="timed turns of each path (default 7)")
    parser.add_argument(
        "--path-limit",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="a path of a workload gets no more turns after this, but at least two (default 20)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it takes minutes to compile")
    parser.add_argument("--peak", action=argparse.BooleanOptionalAction, help="measure the share of the core's peak")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="measure the memory of a T1 step")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/DEVICE.json")
    parser.add_argument("--png", type=Path, help="default benchmarks/results/DEVICE.png")
    parser.add_argument("--workload-file", type=Path, default=WORKLOADS, help="other shapes, as in workloads.json")
    arguments = parser.parse_args()
    arguments.dtypes = arguments.dtypes.split(",")
    if unknown := set(arguments.dtypes) - set(DTYPES):
        parser.error(f"--dtypes must be among {', '.join(DTYPES)}, got {', '.join(sorted(unknown))}")
    if arguments.repeat < 1 or arguments.threads < 1:
        parser.error("--repeat and --threads must be at least 1")
    if arguments.device == "cuda":
        if arguments.peak or arguments.memory:
            parser.error("--peak and --memory measure the CPU, not --device cuda")
        if missing := machine.why_no_gpu():
            parser.error(f"--device cuda needs {missing}")
    arguments.json = arguments.json or RESULTS / f"{arguments.device}.json"
    arguments.png = arguments.png or RESULTS / f"{arguments.device}.png"
    return arguments


def choose(names: str, file: Path, device: str) -> list[Workload]:
    known = {workload.name: workload for workload in load(file, "batch" if device == "cuda" else "cpu_batch")}
    if names == "all":
        return list(known.values())
    chosen = [] if names == "none" else names.split(",")
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"--workloads must be among {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name] for name in chosen]


def compare_all(workload: Workload, dtype: str, arguments: argparse.Namespace) -> list[Comparison]:
    inputs = make_inputs(workload, DTYPES[dtype], device=arguments.device)
    found = []
    for direction in DIRECTIONS:
        paths = peers.paths(not arguments.no_compile, arguments.device)
        limits = {"repeat": arguments.repeat, "path_limit": arguments.path_limit}
        found.append(compare(workload, dtype, direction, paths, inputs, **limits))
        report.print_comparison(found[-1])
    sys.stdout.flush()
    return found


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    (workload,) = [w for w in load(arguments.workload_file, "batch") if w.name == MEMORY_WORKLOAD]
    names = peers.paths(with_compile=not arguments.no_compile)
    used = {name: memory.measure(name, workload, MEMORY_DTYPE) for name in names}
    needed = memory.needed_mib(workload, MEMORY_DTYPE)
    report.print_memory(f"{MEMORY_WORKLOAD}, {MEMORY_DTYPE}, {workload.describe()}", needed, used)
    return {
        "workload": MEMORY_WORKLOAD,
        "dtype": MEMORY_DTYPE,
        "shape": workload.describe(),
        "needed": needed,
        "paths": used,
    }


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    chosen = choose(arguments.workloads, arguments.workload_file, arguments.device)
    measure_all = arguments.workloads == "all" and arguments.device == "cpu"
    with_peak = measure_all if arguments.peak is None else arguments.peak
    with_memory = measure_all if arguments.memory is None else arguments.memory

    facts = machine.describe(arguments.device)
    peak = Peak() if with_peak else None
    peaks = peak.rates() if peak else {}
    report.print_header(facts, peaks, list(peers.paths(not arguments.no_compile, arguments.device)))
    comparisons: list[Comparison] = []
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for workload in chosen:
        for dtype in (d for d in arguments.dtypes if d in workload.dtypes):
            sample = make_inputs(workload.cut(SAMPLE_BATCH), DTYPES[dtype], device=arguments.device)
            uncompiled = peers.paths(with_compile=False)  # those that run everywhere
            errors[f"{workload.name} {dtype}"] = {name: differences(path, sample) for name, path in uncompiled.items()}
            comparisons += compare_all(workload, dtype, arguments)
    report.print_differences(errors)
    shares: list[Share] = []
    if peak:
        shares = measure_shares(peak, facts["instruction_set"], arguments.dtypes)
        report.print_shares(shares)
    used = measure_memory(arguments) if with_memory else {}

    report.write_json(arguments.json, facts, peaks, comparisons, shares, used, errors)
    plot.write_plot(arguments.png, facts, comparisons, shares, used)
    print(f"\n{arguments.json}\n{arguments.png}")


if __name__ == "__main__":
    main()
