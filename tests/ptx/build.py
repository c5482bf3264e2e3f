# SPDX-License-Identifier: BSD-3-Clause
"""Compiles csrc/cuda by nvcc into PTX for some architectures and into host code whose launches go to the interpreter.

What was made is kept under the hash of all it was made from. No ptxas runs: the host code embeds the PTX unassembled.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile

from cuda_emulator.build import CUDA, run_then_rename, traps_for_missing, with_includes

HERE = pathlib.Path(__file__).parent
ARCHS = (80, 90)


def cache() -> pathlib.Path:
    folder = pathlib.Path(tempfile.gettempdir()) / f"torch_gated_attn_ptx_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def compiler_version() -> bytes:
    return subprocess.run(["nvcc", "--version"], check=True, capture_output=True).stdout


def digest(*parts: bytes) -> str:
    result = hashlib.sha256(compiler_version())
    for part in parts:
        result.update(part + b"\0")
    return result.hexdigest()[:20]


def compile_one(source: pathlib.Path) -> pathlib.Path:
    """A folder with object.o and, of a .cu file, the PTX of every architecture, NN.ptx."""
    contents = with_includes(source.resolve(), CUDA.resolve(), {})
    target = cache() / f"{source.stem}_{digest(*contents.values())}"
    if not target.exists():
        partial = target.with_name(f"{os.getpid()}_{target.name}")
        partial.mkdir(exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS]
        options = ["-std=c++20", "-O3", f"-I{CUDA}", "-Xcompiler=-fPIC,-O0,-w", "--keep", f"--keep-dir={partial}"]
        command = ["nvcc", *options, *codes, "-c", str(source), "-o", str(partial / "object.o")]
        subprocess.run(command, check=True, capture_output=True)
        for path in partial.iterdir():
            if path.suffix == ".ptx":
                path.rename(partial / f"{path.stem.rsplit('_', 1)[1]}.ptx")
            elif path.name != "object.o":
                path.unlink()
        partial.rename(target)
    return target


def build(only: tuple[str, ...]) -> tuple[pathlib.Path, dict[int, list[pathlib.Path]]]:
    """A shared library, and the PTX files by architecture, of the instantiations whose names contain one of `only`."""
    chosen = [p for p in sorted(CUDA.rglob("*.cu")) if any(name in p.name for name in only)]
    chosen += [p for p in CUDA.glob("*.cpp") if p.name != "launcher.cpp"] + [HERE / "runtime.cpp"]
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        folders = list(pool.map(compile_one, chosen))
    objects = [folder / "object.o" for folder in folders]
    objects.append(traps_for_missing(objects))
    library = cache() / f"library_{digest(*(str(o).encode() for o in objects))}.so"
    if not library.exists():
        # The process may hold a real runtime, whose functions must not come before ours.
        run_then_rename(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects)], library)
    ptx = {arch: [path for folder in folders if (path := folder / f"{arch}.ptx").exists()] for arch in ARCHS}
    return library, ptx
