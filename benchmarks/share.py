# SPDX-License-Identifier: BSD-3-Clause
"""How much of one core's multiply-add peak the operator reaches, the peak measured beside it.

Counts what the formula needs and nothing that the kernels do besides: per attended query-key pair 2 (D + Dv) flops in
the forward and 2 (3 D + 2 Dv) in the backward (which recomputes the scores); softmax, bias and gate count as nothing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_gated_attn._bench.measure import timed
from torch_gated_attn._bench.peers import operator
from torch_gated_attn._bench.workloads import DTYPES, Workload, load, make_inputs

HEAD_DIMS = (8, 16, 32, 64)
UNDISTURBED = 0.97  # of the usual peak; undisturbed runs of the loop differ by less than 2 %
TURNS, LONGEST_SECONDS = 20, 15.0
T1 = next(workload for workload in load() if workload.name == "T1")  # triangle attention, a training crop
TRIANGLE = T1.cut(16)  # rows; T1's 64 only take longer on one thread
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class Peak:
    """peak.cpp, compiled on the spot; rates in flops per second of one core, 0 if the processor lacks the instruction."""

    def __init__(self) -> None:
        compiler = shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("the peak needs a C++ compiler, and neither g++ nor c++ is on the PATH")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "peak.so")
            source = Path(__file__).with_name("peak.cpp")
            subprocess.run([compiler, "-O2", "-std=c++20", "-shared", "-fPIC", source, "-o", library], check=True)
            self._flops = ctypes.CDLL(str(library)).peak_flops
        self._flops.restype = ctypes.c_double

    def rate(self, kind: str, runs: int = 5) -> float:
        return max(self._flops(kind.encode()) for _ in range(runs))

    def rates(self) -> dict[str, float]:
        return {kind: self.rate(kind) for kind in ("fma256", "fma512", "dot512")}


def yardstick(instruction_set: str, dtype: str, peaks: dict[str, float]) -> str:
    """The fastest instruction that the operator may use for the products of this dtype."""
    if not instruction_set.startswith("avx512"):
        return "fma256"
    # Sapphire Rapids does a third as many flops per second with the bfloat16 dot product as with float32 FMA; Zen twice.
    allowed = ["fma512", "dot512"] if instruction_set == "avx512_bf16" and dtype == "bfloat16" else ["fma512"]
    return max(allowed, key=lambda instruction: peaks[instruction])


@dataclass
class Share:
    dtype: str
    head_dim: int
    direction: str
    flops_per_second: float
    instruction: str
    peak: float

    @property
    def share(self) -> float:
        return self.flops_per_second / self.peak if self.peak else float("nan")


def keep_freed_memory() -> None:
    """Has glibc keep what PyTorch frees: a result on fresh pages costs the system's time, a tenth of a call and more.

    Beside other allocators, which keep it anyway, this does nothing.
    """
    c = ctypes.CDLL(None)
    if hasattr(c, "mallopt"):
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            c.mallopt(threshold, 1 << 30)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_shares(peak: Peak, instruction_set: str, dtypes: list[str], base: Workload = TRIANGLE) -> list[Share]:
    keep_freed_memory()
    shares, peaks = [], peak.rates()
    with one_thread():
        for dtype in dtypes:
            for head_dim in HEAD_DIMS:
                shares += _measure(
                    peak,
                    yardstick(instruction_set, dtype, peaks),
                    dtype,
                    dataclasses.replace(base, head_dim=head_dim),
                )
    return shares


def _measure(peak: Peak, instruction: str, dtype: str, workload: Workload) -> list[Share]:
    inputs = make_inputs(workload, DTYPES[dtype])
    leaves = list(inputs.differentiable.values())

    def forward() -> None:
        with torch.no_grad():
            operator(*inputs.tensors)

    out = operator(*inputs.tensors)

    def backward() -> None:
        torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)

    flops = 2 * workload.head_dim * workload.attended_pairs(inputs.mask)  # of one product Q x K x D, attended keys only
    shares = []
    for direction, call, products in (("forward", forward, 2), ("backward", backward, 5)):
        seconds, rate = best_undisturbed(call, lambda: peak.rate(instruction, runs=1))
        shares.append(Share(dtype, workload.head_dim, direction, products * flops / seconds, instruction, rate))
    return shares


def best_undisturbed(call: Callable[[], None], peak_rate: Callable[[], float]) -> tuple[float, float]:
    """Of TURNS calls with the peak right before and after, the shortest for its peak: its seconds, and that peak.

    A core that another machine shares does two thirds of its work for seconds at a time, and for moments a tenth more; a
    multiply-add loop shows both. So a call counts only where that loop ran undisturbed on both sides, and is held against
    the faster of the two. After LONGEST_SECONDS what there is must do.
    """
    call()  # warms up
    turns, before, end = [], peak_rate(), time.monotonic() + LONGEST_SECONDS
    counted: list[tuple[float, float]] = []
    while len(counted) < TURNS and time.monotonic() < end:
        seconds, after = timed(call), peak_rate()
        turns.append((min(before, after), max(before, after), seconds))
        before = after
        usual = sorted(low for low, _, _ in turns)[len(turns) * 9 // 10]
        counted = [(seconds, high) for low, high, seconds in turns if low > UNDISTURBED * usual]
    return min(counted, key=lambda turn: turn[0] * turn[1])
