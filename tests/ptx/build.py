# SPDX-License-Identifier: BSD-3-Clause
"""Compiles csrc/cuda by nvcc into PTX for some architectures and into host code whose launches go to the interpreter.

What was made is kept under the hash of all it was made from. No ptxas runs: the host code embeds the PTX unassembled.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile

from cuda_emulator.build import CUDA, run_then_rename, traps_for_missing, with_includes

HERE = pathlib.Path(__file__).parent
# Which instantiations are compiled for which architecture: float16 differs from bfloat16 in the names of two instructions.
ARCHS = {80: ("bf16", "fp32_16", "bias_workspace", "plain"), 90: ("",)}


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


def archs_of(source: pathlib.Path) -> list[int]:
    return [arch for arch, names in ARCHS.items() if any(name in source.name for name in names)]


def compile_one(source: pathlib.Path) -> pathlib.Path:
    """A folder with object.o and, of a .cu file, the PTX of its architectures, NN.ptx."""
    archs = archs_of(source)
    codes = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs]
    options = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-O0,-w", *codes]
    contents = with_includes(source.resolve(), CUDA.resolve(), {})
    target = cache() / f"{source.stem}_{digest(' '.join(options).encode(), *contents.values())}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            partial = pathlib.Path(folder)
            command = ["nvcc", *options, f"-I{CUDA}", "--keep", f"--keep-dir={partial}", "-c", str(source)]
            subprocess.run([*command, "-o", str(partial / "object.o")], check=True)
            made = partial / "made"
            made.mkdir()
            (partial / "object.o").rename(made / "object.o")
            for arch in archs:  # nvcc names the architecture where there are several
                for name in (f"{source.stem}.compute_{arch}.ptx", f"{source.stem}.ptx"):
                    if (partial / name).exists():
                        (partial / name).rename(made / f"{arch}.ptx")
            with contextlib.suppress(OSError):  # another process may have been as fast
                made.rename(target)
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
