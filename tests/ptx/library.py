# SPDX-License-Identifier: BSD-3-Clause
"""The interpreter in the place of the emulator's library: cuda_emulator.harness and as_cpu run calls on it unchanged."""

from __future__ import annotations

import ctypes
import gc
import pathlib
import subprocess
import types
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from cuda_emulator import kernels
from cuda_emulator.harness import Problem

from . import parser
from .machine import MOST_THREADS, Machine
from .memory import GlobalMemory
from .parser import Kernel

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_size_t)
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a block may ask for


class Launch(NamedTuple):
    kernel: Kernel
    warps: int
    issued: np.ndarray  # how often a warp issued each instruction


def demangled(names: Iterable[str]) -> str:
    """One to a line."""
    return subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout


class Library:
    """`kernels`: by architecture and mangled name; a test may put others there."""

    def __init__(self, path: pathlib.Path, ptx: dict[int, list[pathlib.Path]]) -> None:
        self.host = ctypes.CDLL(str(path))
        self.host.ptx_run.restype = ctypes.c_char_p
        assert self.host.ptx_problem_bytes() == ctypes.sizeof(Problem), "harness.py and csrc/problem.h disagree"
        self.kernels: dict[int, dict[str, Kernel]] = {
            arch: {n: k for path in paths for n, k in parser.parse(path.read_text()).items()} for arch, paths in ptx.items()
        }
        self.launched: list[Launch] = []  # of the last call
        self.shared_bytes = 0
        self.memory = GlobalMemory()
        self.error: BaseException | None = None

    def variants(self, arch: int) -> dict[kernels.Kernel, str]:
        """Mangled names by type, head_dim and variant."""
        mangled = list(self.kernels[arch])
        return dict(zip(map(kernels.parse_one, demangled(mangled).splitlines()), mangled, strict=True))

    # The names and signatures of the emulator's library.
    def emulator_allow(self, start: ctypes.c_void_p, size: ctypes.c_size_t, writable: int) -> None:
        self.memory.allow(start.value or 0, size.value, bool(writable))

    def emulator_limit_shared_bytes(self, size: int) -> None:
        self.shared_bytes = size

    def emulator_forward(self, problem, arch: int, seed: int) -> bytes:
        return self.call(problem, arch, False, False)

    def emulator_backward(self, problem, arch: int, seed: int, d_gate_is_float: int) -> bytes:
        return self.call(problem, arch, True, bool(d_gate_is_float))

    def emulator_launched(self) -> bytes:
        return demangled(launch.kernel.name for launch in self.launched).encode()

    def emulator_tiles(self) -> bytes:
        return b""

    def emulator_report(self) -> types.SimpleNamespace:
        """A finding ends the run: there is none left to report."""
        return types.SimpleNamespace(contents=types.SimpleNamespace(findings=dict))

    def call(self, problem, arch: int, backward: bool, d_gate_is_float: bool) -> bytes:
        scratch: list[np.ndarray] = []
        self.launched, self.error = [], None

        def allocate(size: int) -> int:
            scratch.append(np.full(size + 256, 0xFF, np.uint8))  # garbage, like recycled device memory
            start = scratch[-1].ctypes.data
            start += -start % 256
            self.memory.allow(start, size, True)
            return start

        def launch(name: bytes, parameters: int, blocks: int, threads: int, shared: int) -> int:
            try:
                self.launch(self.kernels[arch][name.decode()], parameters, blocks, threads, shared)
            except BaseException as error:  # no exception gets through C++
                self.error = error
                return 1
            return 0

        collects = gc.isenabled()
        gc.disable()  # what instructions become are objects by the hundred thousand, none of them garbage
        try:
            message = self.host.ptx_run(
                problem,
                arch,
                self.shared_bytes or SHARED_BYTES[arch],
                backward,
                d_gate_is_float,
                LAUNCH(launch),
                ALLOCATE(allocate),
            )
        finally:
            self.memory = GlobalMemory()
            if collects:
                gc.enable()
        if self.error is not None:
            raise self.error
        return message

    def launch(self, kernel: Kernel, parameters: int, blocks: int, threads: int, shared: int) -> None:
        raw = ctypes.string_at(parameters, kernel.parameter_bytes)
        self.memory.next_launch()
        together = max(1, MOST_THREADS // threads)
        issued = np.zeros(len(kernel.statements), np.int64)
        for first in range(0, blocks, together):
            span = range(first, min(first + together, blocks))
            machine = Machine(kernel, raw, span, threads, shared, self.memory)
            machine.run()
            issued += machine.issued
        self.launched.append(Launch(kernel, blocks * threads // 32, issued))
