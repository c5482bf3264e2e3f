# SPDX-License-Identifier: BSD-3-Clause
"""Train a small Evoformer on a real protein family, once on plain PyTorch attention and once on torch_gated_attn.

Both runs start from the same parameters and see the same examples: the Pfam seed alignment of the protein kinases with
15 % of its residues hidden. Prints what the operator saves, checks that both runs agree, and draws both.

    python examples/evoformer_demo.py
    python examples/evoformer_demo.py --quick
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from evoformer import memory
from evoformer.agreement import check_first_step, check_losses
from evoformer.data import held_out_examples, load_family, majority_accuracy, training_example
from evoformer.implementations import IMPLEMENTATIONS
from evoformer.report import print_table, write_plot
from evoformer.train import build_runs, held_out_accuracy, train

OUTPUT = Path(__file__).resolve().parent / "output" / "evoformer.png"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="training steps of each run (default 50)")
    parser.add_argument("--columns", type=int, default=192, help="residues per crop (default 192)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the plot (default examples/output/evoformer.png)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 4 steps of 24 columns")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.columns = 4, 24
    if arguments.steps < 1 or arguments.columns < 1:
        parser.error("--steps and --columns must be at least 1")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    start = time.perf_counter()
    sequences, held_out = load_family()
    runs = build_runs(IMPLEMENTATIONS)
    threads = torch.get_num_threads()
    cores = "1 thread" if threads == 1 else f"{threads} threads"
    setting = f"{len(sequences)} rows, {arguments.columns} columns, {cores}, float32"
    print(
        f"Evoformer on Pfam PF00069: {len(sequences)} training and {len(held_out)} held-out sequences; {setting}",
        flush=True,
    )

    print("peak memory of one step, each in its own process ...", flush=True)
    for run in runs:
        run.step_mib = memory.measure(run.name, arguments.columns)
    print("first step against float64 ...", flush=True)
    checks = check_first_step(runs[0].model, runs[1].model, training_example(sequences, 0, arguments.columns))
    train(runs, sequences, arguments.steps, arguments.columns)
    checks.append(check_losses(runs))
    for run in runs:
        run.accuracy = held_out_accuracy(run.model, sequences, held_out, arguments.columns)

    print()
    baseline = majority_accuracy(held_out_examples(sequences, held_out, arguments.columns))
    print_table(runs, checks, baseline)
    write_plot(runs, arguments.output, setting)
    print(f"\nplot: {arguments.output}   total: {time.perf_counter() - start:.0f} s")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
