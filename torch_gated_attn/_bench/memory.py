# SPDX-License-Identifier: BSD-3-Clause
"""Peak extra memory of one training step per path, each in a fresh process."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from .measure import forward_backward
from .peers import COMPILED, paths
from .workloads import DTYPES, Workload, make_inputs

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


def measure(path: str, workload: Workload, dtype: str, device: str = "cpu") -> float:
    """MiB by which one forward and backward of a path raises the peak, in a new process.

    On a CPU the peak is that of the process's resident memory, on a CUDA device that of PyTorch's allocator.
    """
    shape = json.dumps(dataclasses.asdict(workload))
    command = [sys.executable, "-m", __name__, path, shape, dtype, device, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise RuntimeError(f"the process that measures the memory of {path} ended with {done.returncode}: {said[-1]}")
    return float(done.stdout)


def main(path: str, shape: str, dtype: str, device: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    workload = Workload(**json.loads(shape))
    run = paths(path in COMPILED, device)[path]
    inputs = make_inputs(workload, DTYPES[dtype], device=device)
    # Threads, libraries and code pages first. Compiled code is made for one shape, so there the warm-up is the real step.
    forward_backward(run, inputs if path in COMPILED else make_inputs(workload.cut(1), DTYPES[dtype], device=device))
    if device == "cpu":
        RESET_PEAK.write_text("5")
        before = peak_resident_mib()
        forward_backward(run, inputs)
        print(peak_resident_mib() - before)
    else:
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        forward_backward(run, inputs)
        print((torch.cuda.max_memory_allocated(device) - allocated) / 2**20)


if __name__ == "__main__":
    main(*sys.argv[1:])
