# SPDX-License-Identifier: BSD-3-Clause
"""Compiles csrc/cuda for the host: the same kernel sources, with emulated_device.h in place of the PTX.

Objects are kept under the hash of all they are made from, so that a planted bug compiles only the files it reaches.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import pathlib
import re
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
SANITIZE = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
INCLUDE = re.compile(rb'^#include "([^"]+)"', re.MULTILINE)


def cache() -> pathlib.Path:
    folder = pathlib.Path(tempfile.gettempdir()) / f"torch_gated_attn_emulator_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def sources(root):
    """Everything of csrc/cuda but the launcher, which needs torch."""
    return sorted([*root.rglob("*.cu"), *(p for p in root.glob("*.cpp") if p.name != "launcher.cpp")])


def with_includes(path, root, found):
    """Adds to `found` the file and all of the project's it includes: {path: content}."""
    if path not in found:
        found[path] = path.read_bytes()
        for name in INCLUDE.findall(found[path]):
            places = [folder / name.decode() for folder in (path.parent, HERE, root)]
            with_includes(next(p for p in places if p.exists()).resolve(), root, found)
    return found


@functools.cache
def compiler_version():
    return subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout


def digest(flags, contents):
    result = hashlib.sha256(compiler_version())
    for part in (" ".join(flags).encode(), *contents):
        result.update(part + b"\0")
    return result.hexdigest()[:20]


def run_then_rename(command, target):
    """The command's output appears at once, so that two processes may build the same file."""
    partial = target.with_name(f"{os.getpid()}_{target.name}")
    subprocess.run([*command, "-o", str(partial)], check=True)
    partial.rename(target)


def compile_one(source, root, flags):
    # Every library keeps its own emulator: no symbols that the loader makes unique in the process.
    options = ["-std=c++20", *flags, "-fPIC", "-fno-gnu-unique", "-w"]
    contents = with_includes(source.resolve(), root.resolve(), {})
    target = cache() / f"{source.stem}_{digest(options, contents.values())}.o"
    if not target.exists():
        run_then_rename(["g++", *options, f"-I{HERE}", f"-I{root}", "-x", "c++", "-c", str(source)], target)
    return target


def traps_for_missing(objects):
    """An object that defines the host functions left out of a partial build as traps."""
    listing = subprocess.run(["nm", *map(str, objects)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines() if "16torch_gated_attn4cuda" in line]
    defined = {name for kind, name in symbols if kind != "U"}
    missing = sorted({name for _, name in symbols} - defined)
    text = "".join(f".globl {name}\n{name}:\n  ud2\n" for name in missing) + '.section .note.GNU-stack,"",@progbits\n'
    source = cache() / f"traps_{digest((), [text.encode()])}.s"
    source.write_text(text)
    target = source.with_suffix(".o")
    run_then_rename(["as", str(source)], target)
    return target


def build(root=CUDA, flags=("-O2",), only=None, instead=(), program=False):
    """Path of a shared library with the emulated kernels of `root`.

    `only` limits the instantiations to those whose names contain one of its strings, beside the sources `instead` of the
    others. With `program`, of the program that runs a few calls by itself, since sanitizers want a process of their own.
    """
    chosen = [s for s in sources(root) if only is None or s.suffix == ".cpp" or any(o in s.name for o in only)]
    main = HERE / ("program.cpp" if program else "driver.cpp")
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count()))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda source: compile_one(source, root, flags), [*chosen, *instead, main]))
    if only is not None:
        objects.append(traps_for_missing(objects))
    result = cache() / f"emulated_{digest(flags, [str(o).encode() for o in objects])}.{'out' if program else 'so'}"
    if not result.exists():
        run_then_rename(["g++", *([] if program else ["-shared"]), *flags, *map(str, objects)], result)
    return result
