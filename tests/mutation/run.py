# SPDX-License-Identifier: BSD-3-Clause
"""Builds the library with each mutant, runs the fast part of the suite against it and writes docs/mutation.md.

`python tests/mutation/run.py` needs a checkout built without CUDA, whose object files it links;
`python tests/mutation/run.py 3 18` tries these mutants only and writes nothing; `--check` builds nothing and says which no
longer fit the sources. A mutant that survives fails the run.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from mutants import MUTANTS, Mutant, outdated
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
# In this order, the first that fails ends the run: short and broad first.
FAST = [
    "test_relations.py",
    "test_broadcast.py::test_bias_over_every_subset",
    "test_masks.py::test_fully_masked_rows",
    "test_special.py::test_gates",
    "test_layout.py::test_every_order_of_dimensions",
    "test_layout.py::test_expanded_inputs",
    "test_special.py::test_empty_dimensions",
    "test_special.py::test_denormal_arithmetic_of_the_caller_is_left_as_it_was",
    "test_numerics.py::test_head_dims",
    "test_numerics.py::test_heads_and_batch_dimensions",
    "test_numerics.py::test_a_few_keys_for_one_query",
    "test_numerics.py::test_a_few_masked_keys_leave_no_trace",
    "test_special.py::test_16_bit_sums_do_not_stop_growing",
    "test_special.py::test_large_logits",
    "test_masks.py::test_additive_masks",
    "test_masks.py::test_finite_low_logits_are_not_masked_rows",
    "test_size.py::test_offsets_beyond_2_31",
    "test_visibility.py::test_every_window_and_every_length",
    "test_visibility.py::test_every_offset_of_the_diagonal_within_a_tile",
    "test_visibility.py::test_block_sparse_masks",
    "test_visibility.py::test_work_that_is_shared_out_in_parts",
    "test_fuzz.py",
]
# The launcher of the CUDA kernels runs on a runtime that pretends to have two devices, compiled by this test itself.
FAST_CUDA = ["test_cuda_stub.py"]
FLAGS = ["-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w", "-DTORCH_EXTENSION_NAME=_C", "-DNDEBUG"]


def objects() -> Path:
    kept = list(ROOT.glob(f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}-cpu-*-release/csrc"))
    if not kept:
        raise SystemExit("no object files: run `TORCH_GATED_ATTN_CUDA=0 python setup.py build_ext --inplace` first")
    return kept[0]


def plant(mutant: Mutant, tree: Path) -> None:
    path = tree / "csrc" / mutant.file
    path.write_text(path.read_text().replace(mutant.right, mutant.wrong, 1))


def build(mutant: Mutant, tree: Path) -> None:
    """Compiles what the mutant changed, for one instruction set if it is a kernel, and links it with the built rest."""
    kernel = mutant.file.endswith(".h")
    source = f"cpu/{mutant.capability}.cpp" if kernel else mutant.file
    changed = tree / "changed.o"
    include = [f"-isystem{path}" for path in cpp_extension.include_paths("cpu")] if not kernel else []
    optimise = "-O1"  # a mutant is not timed
    subprocess.run(["g++", optimise, *FLAGS, *include, "-c", str(tree / "csrc" / source), "-o", str(changed)], check=True)
    replaced = objects() / Path(source).with_suffix(".o")
    others = [str(path) for path in objects().rglob("*.o") if path != replaced]
    library = next((ROOT / "torch_gated_attn").glob("_C*.so")).name
    torch_lib = cpp_extension.library_paths("cpu")[0]
    target = tree / "torch_gated_attn" / library
    target.unlink()
    torch_libraries = [f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
    link = ["g++", "-shared", "-fopenmp", str(changed), *others, *torch_libraries, "-o", str(target)]
    subprocess.run(link, check=True)


def fate(mutant: Mutant) -> str | None:
    """The test that kills the mutant, or None."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("csrc", "tests", "torch_gated_attn"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        plant(mutant, tree)
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        if mutant.capability:
            build(mutant, tree)
            environment["TORCH_GATED_ATTN_CPU_CAPABILITY"] = mutant.capability
        environment |= {"TORCH_GATED_ATTN_FUZZ_EXAMPLES": "60", "TORCH_GATED_ATTN_FUZZ_SEED": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=line", "--no-header", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [*command, *(str(tree / "tests" / test) for test in (FAST if mutant.capability else FAST_CUDA))],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=3600,
        )
    if run.returncode == 0:
        return None
    failed = re.search(r"^FAILED tests/(.+?)(?: - |$)", run.stdout, re.MULTILINE)
    if failed:
        return failed.group(1)
    if run.returncode < 0:  # the last test that was named had begun
        begun = re.findall(r"^tests/(.+?)(?: [A-Z]+ +\[|\s*$)", run.stdout, re.MULTILINE)
        return f"{begun[-1]} (signal {-run.returncode})"
    said = run.stdout[-2000:] + run.stderr[-2000:]
    raise SystemExit(f"mutant {mutant.number}: pytest ended with {run.returncode}:\n{said}")


def report(fates: dict[int, str | None]) -> str:
    killed = sum(fate is not None for fate in fates.values())
    lines = [
        "# Mutants",
        "",
        "What `python tests/mutation/run.py` printed: each deliberate error is built into the library, the fast part of",
        "the suite is run against it, and the first test that fails is named. Kernels were compiled for the instruction",
        "set given; the launcher of the CUDA kernels ran on a runtime that pretends to have two devices (tests/cuda_stub).",
        "",
        f"Date: {datetime.date.today()}. Machine: {platform.machine()}, torch {torch.__version__}.",
        f"{killed} of {len(fates)} killed. The CUDA kernels have mutants of their own in tests/cuda_emulator/bugs.py,",
        "which are part of every run: tests/test_cuda_emulator.py::test_planted_bug_is_caught. So does what nvcc makes of",
        "them, in tests/ptx/mutations.py: tests/test_ptx.py::test_mutation_of_the_ptx_is_caught.",
        "",
        "| number | error | file | instruction set | killed by |",
        "|---|---|---|---|---|",
    ]
    rows = [f"| {m.number} | {m.name} | {m.file} | {m.capability} | {fates[m.number] or '**survived**'} |" for m in MUTANTS]
    return "\n".join([*lines, *rows, ""])


def main(wanted: Sequence[str]) -> None:
    if stale := outdated(ROOT / "csrc"):
        raise SystemExit("\n".join(stale))
    if "--check" in wanted:
        return
    if not wanted or "0" in wanted:
        # Without an error nothing may fail, or the fates below would mean nothing.
        for none in (Mutant(0, "none", "cpu/forward_block.h", "", ""), Mutant(0, "none", "cuda/launcher.cpp", "", "", "")):
            if control := fate(none):
                raise SystemExit(f"{control} fails without a mutant")
        print("  0 none: every test passes", flush=True)
    chosen = [m for m in MUTANTS if not wanted or str(m.number) in wanted]
    fates: dict[int, str | None] = {}
    for mutant in chosen:
        fates[mutant.number] = fate(mutant)
        print(f"{mutant.number:3} {mutant.name}: {fates[mutant.number] or 'SURVIVED'}", flush=True)
    if not wanted:
        (ROOT / "docs" / "mutation.md").write_text(report(fates))
    survivors = [number for number, test in fates.items() if test is None]
    print(f"{len(fates) - len(survivors)} of {len(fates)} killed")
    raise SystemExit(f"survived: {survivors}" if survivors else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
