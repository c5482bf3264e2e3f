# SPDX-License-Identifier: BSD-3-Clause
"""Peak extra memory of one training step, measured in a fresh process per implementation.

`python -m evoformer.memory plain 192` prints the growth of the process's peak resident memory in MiB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from .data import load_family, training_example
from .implementations import IMPLEMENTATIONS
from .train import build_runs, make_optimizer, train_step

_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")  # "5" sets the peak to what is resident now, see proc(5)


def peak_resident_mib() -> float:
    # Not getrusage: its ru_maxrss survives exec, so a child starts with its parent's peak.
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def measure(name: str, columns: int) -> float | None:
    """Run `main` in a new process; None where the system does not tell."""
    if not _STATUS.exists():
        return None
    command = [sys.executable, "-m", "evoformer.memory", name, str(columns), str(torch.get_num_threads())]
    result = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, check=True, capture_output=True, text=True)
    return float(result.stdout)


def main(name: str, columns: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    (run,) = build_runs({name: IMPLEMENTATIONS[name]})
    optimizer, (sequences, _) = make_optimizer(run.model), load_family()
    train_step(run.model, optimizer, training_example(sequences, 0, columns=8))  # threads, Adam's state, code pages
    _RESET_PEAK.write_text("5")
    before = peak_resident_mib()
    train_step(run.model, optimizer, training_example(sequences, 0, int(columns)))
    print(peak_resident_mib() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
