# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the torch-free core with driver.cpp, once per content, with one sanitizer or another."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
X86_SETS = ("default", "avx2", "avx512", "avx512_bf16")
ARM_SETS = ("default", "neon")
SETS = {"x86_64": X86_SETS, "aarch64": ARM_SETS, "arm64": ARM_SETS}.get(platform.machine(), ("default",))
FLAGS = ("-std=c++20", "-g1", "-Wall", "-Wextra", "-Wno-psabi", "-pthread")


def build(compiler: str, flags: Sequence[str], sets: Sequence[str] = SETS, csrc: Path = CSRC) -> Path:
    """Path of the driver with the kernels of these instruction sets."""
    # In this order: of an inline function in several objects the linker takes the first, which any machine must run.
    sources = [HERE / "driver.cpp", HERE / "call.cpp", *(csrc / "cpu" / f"{name}.cpp" for name in sets)]
    digest = hashlib.sha256(" ".join([compiler, *flags, *sets]).encode())
    for path in [
        *sources,
        *sorted([*(csrc / "cpu").glob("*.h"), csrc / "problem.h", csrc / "visibility.h", *HERE.glob("*.h")]),
    ]:
        digest.update(path.read_bytes())
    out = Path(tempfile.gettempdir()) / f"torch_gated_attn_core_{os.getuid()}" / digest.hexdigest()[:16]
    program = out / "driver"
    if program.exists():
        return program
    out.mkdir(parents=True, exist_ok=True)
    defines = [f"-DWITH_{name.upper()}" for name in sets]

    def compile_one(source: Path) -> Path:
        target = out / f"{source.stem}_{os.getpid()}.o"
        own = ["-Werror"]
        if source.stem.startswith("avx512") and any(flag.startswith("-fsanitize") for flag in flags):
            own += ["-include", str(HERE / "instrumented.h")]
        command = [compiler, *FLAGS, *flags, *own, *defines, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return target

    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = out / f"driver_{os.getpid()}"
    subprocess.run([compiler, *flags, "-pthread", *map(str, objects), "-o", str(partial)], check=True)
    partial.rename(program)
    return program
