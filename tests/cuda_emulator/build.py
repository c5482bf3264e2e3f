# SPDX-License-Identifier: BSD-3-Clause
"""Compiles csrc/cuda for the host: the same kernel sources, with emulated_device.h in place of the PTX."""

import concurrent.futures
import hashlib
import os
import pathlib
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
SANITIZE = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def sources(root):
    """Everything of csrc/cuda but the launcher, which needs torch."""
    return sorted([*root.rglob("*.cu"), *(p for p in root.glob("*.cpp") if p.name != "launcher.cpp")])


def traps_for_missing(objects, out):
    """An object that defines the host functions left out of a partial build as traps."""
    listing = subprocess.run(["nm", *map(str, objects)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines() if "16torch_gated_attn4cuda" in line]
    defined = {name for kind, name in symbols if kind != "U"}
    missing = sorted({name for _, name in symbols} - defined)
    source = out / "traps.s"
    source.write_text(
        "".join(f".globl {name}\n{name}:\n  ud2\n" for name in missing) + '.section .note.GNU-stack,"",@progbits\n'
    )
    target = out / "traps.o"
    subprocess.run(["as", str(source), "-o", str(target)], check=True)
    return target


def build(root=CUDA, flags=("-O2",), only=None, program=False):
    """Path of a shared library with the emulated kernels of `root`, compiled once per content.

    `only` limits the instantiations to those whose names contain one of its strings. With `program`, of the program
    that runs a few calls by itself, since sanitizers want a process of their own.
    """
    chosen = [s for s in sources(root) if only is None or s.suffix == ".cpp" or any(o in s.name for o in only)]
    main = HERE / ("program.cpp" if program else "driver.cpp")
    digest = hashlib.sha256(" ".join(map(str, [*flags, main, *chosen])).encode())
    for path in sorted([*root.rglob("*.*"), root.parent / "problem.h", *HERE.glob("*.*")]):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h"):
            digest.update(path.read_bytes())
    out = pathlib.Path(tempfile.gettempdir()) / f"torch_gated_attn_emulator_{os.getuid()}" / digest.hexdigest()[:16]
    result = out / ("calls" if program else "libemulated_kernels.so")
    if result.exists():
        return result
    out.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        target = out / (source.name + ".o")
        # Every library keeps its own emulator: no symbols that the loader makes unique in the process.
        options = ["-std=c++20", *flags, "-fPIC", "-fno-gnu-unique", "-w", f"-I{HERE}", f"-I{root}"]
        subprocess.run(["g++", *options, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count()))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, [*chosen, main]))
    if only is not None:
        objects.append(traps_for_missing(objects, out))
    partial = out / f"partial_{os.getpid()}"
    shared = [] if program else ["-shared"]
    subprocess.run(["g++", *shared, *flags, *map(str, objects), "-o", str(partial)], check=True)
    partial.rename(result)
    return result
