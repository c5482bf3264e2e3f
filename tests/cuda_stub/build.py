# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the runtime that pretends to have devices, and the launcher of the CUDA kernels without the kernels.

nvcc compiles no device code here: it is the host compiler that knows where the CUDA headers are.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
LAUNCHER = (
    "describe",
    "operands",
    "composite",
    "cpu/ordered_sum",
    "cuda/launcher",
    "cuda/make_params",
    "cuda/select",
    "cuda/run_forward",
    "cuda/run_backward",
)


def folder() -> Path:
    path = Path(tempfile.gettempdir()) / f"torch_gated_attn_cuda_stub_{os.getuid()}"
    path.mkdir(exist_ok=True)
    return path


def made(command: Sequence[str], read: Sequence[Path], name: str) -> Path:
    """What the command writes, made once for each content of the files it reads, wherever they lie."""
    words = " ".join(command).replace(str(HERE.parents[1]), "")
    digest = hashlib.sha256(f"{words} {torch.__version__}".encode())
    for path in read:
        digest.update(path.read_bytes())
    target = folder() / f"{digest.hexdigest()[:16]}_{name}"
    if not target.exists():
        partial = target.with_name(f"{os.getpid()}_{target.name}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def runtime() -> Path:
    """To be preloaded. Its name inside is the driver's, so that whoever opens the driver is given it."""
    source = HERE / "runtime.cpp"
    alone = ["--cudart=none", "-shared", "-Xlinker=-soname,libcuda.so.1"]
    command = ["nvcc", "-std=c++20", "-Xcompiler=-fPIC", *alone, str(source)]
    return made(command, [source], "runtime.so")


def launcher() -> Path:
    """A library that registers the CUDA key of the operators; what it launches is kernels.h."""
    headers = sorted([*CSRC.rglob("*.h"), HERE / "kernels.h"])
    flags = ["-std=c++20", "-O1", "-Xcompiler=-fPIC,-fvisibility=hidden,-w"]
    include = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]

    def compiled(name: str) -> Path:
        source = CSRC / f"{name}.cpp"
        stand_in = ["-include", str(HERE / "kernels.h")] if "run_" in name else []
        return made(["nvcc", *flags, *include, *stand_in, "-c", str(source)], [source, *headers], f"{source.stem}.o")

    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, LAUNCHER))
    libraries = [f"-L{cpp_extension.library_paths('cpu')[0]}", "-ltorch", "-ltorch_cpu", "-lc10", "-lc10_cuda"]
    link = ["nvcc", "--cudart=shared", "-shared", *map(str, objects), *libraries]
    return made(link, objects, "launcher.so")
