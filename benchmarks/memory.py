# SPDX-License-Identifier: BSD-3-Clause
"""Peak extra memory of one training step per path, each in a fresh process.

`python benchmarks/memory.py sdpa T1 float32` prints the growth of the process's peak resident memory, in MiB.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import torch
from measure import forward_backward
from peers import paths
from workloads import DTYPES, WORKLOADS, Workload, load, make_inputs

_STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")  # "5" sets the peak to what is resident now, see proc(5)


def peak_resident_mib() -> float:
    # Not getrusage: its ru_maxrss survives exec, so a child starts with its parent's peak.
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def needed_mib(workload: Workload, dtype: str) -> float:
    """What no implementation can avoid: out, its log-sum-exp, and the gradient of every input."""
    w = workload
    batch = math.prod(w.batch)
    queries, keys = batch * w.heads * w.q_len, batch * w.kv_heads * w.k_len
    elements = queries * w.head_dim * (3 if w.gated else 2)  # out, dQuery, dGate
    elements += keys * w.head_dim * 2  # dKey, dValue
    elements += math.prod(w.bias_shape) if w.bias_shape else 0
    return (elements * DTYPES[dtype].itemsize + queries * 4) / 2**20


def measure(path: str, workload: Workload, dtype: str, file: Path = WORKLOADS) -> float:
    """Run `main` in a new process, at the workload's full batch."""
    command = [sys.executable, __file__, path, workload.name, dtype, str(torch.get_num_threads()), str(file)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(path: str, name: str, dtype: str, threads: str, file: str) -> None:
    import torch_gated_attn  # noqa: F401  # registers the operator; in every process, so that all start alike

    torch.set_num_threads(int(threads))
    (workload,) = [w for w in load(Path(file), batch_key="batch") if w.name == name]
    run = paths(with_compile=path == "compile")[path]
    inputs = make_inputs(workload, DTYPES[dtype])
    # Threads, libraries and code pages first. Compiled code is made for one shape, so there the warm-up is the real step.
    forward_backward(run, inputs if path == "compile" else make_inputs(workload.cut(1), DTYPES[dtype]))
    RESET_PEAK.write_text("5")
    before = peak_resident_mib()
    forward_backward(run, inputs)
    print(peak_resident_mib() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
