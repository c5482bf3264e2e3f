#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA kernels cost per score element, read from their machine code: no GPU is needed.

Compiles the tensor-core kernels, disassembles them with cuobjdump (of the CUDA toolkit, or of the Triton wheel), finds the
main loop of each, and prints per kernel registers, stack and, per score element and thread: issue slots, those of the
shortest way round the loop, tensor-core instructions (m16n8k16), exponentials, ldmatrix, reductions in global memory, local
memory, and the milliclocks that each unit of an H100 takes (issue, exponentials, tensor cores, shared memory, L2); the
largest binds. All but the shortest way count instructions that a branch may skip. Exits with 1 when a budget of
csrc/cuda/budgets.json is broken, and says so in one line when a tool is missing.

    python benchmarks/sass_report.py            sm_80 and sm_90, every type and every head_dim that must not spill
    python benchmarks/sass_report.py --peers    the same, and PyTorch's memory-efficient attention and trifast
    python benchmarks/sass_report.py --archs sm_120 --head-dims 96
    python benchmarks/sass_report.py --binary other.cubin --only 'fmha|attn'      the kernels of another library
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import sass_peers
from sass import ATOMICS, CLOCK, LOCAL, MULTIPROCESSORS, Cost, Kernel, cost, disassemble, find_tool

ROOT = pathlib.Path(__file__).resolve().parents[1] / "csrc" / "cuda"
BUDGETS = json.loads((ROOT / "budgets.json").read_text())
HEAD_DIMS = [16, 32, 48, 64]
TYPES = ["bf16", "fp16", "fp32"]
BUDGET_ARCH, BUDGET_DTYPE = "sm_90", "bf16"  # of the slots; spills and atomics count everywhere
ACCESS, DTYPES = ("none", "half", "float", "general"), ("fp32", "fp64", "bf16", "fp16")  # by their numbers in the sources


@dataclasses.dataclass
class Row:
    """One line of the report."""

    arch: str
    dtype: str  # empty: for any
    head_dim: int  # 0: for any
    name: str  # forward, backward_query, ...
    access: str
    strip: bool
    shares: bool  # several batch rows share the bias of a block
    kernel: Kernel
    cost: Cost | None

    @property
    def label(self) -> str:
        head_dim = f"D={self.head_dim} " if self.head_dim else ""
        return f"{self.name} {head_dim}{self.access}".rstrip() + " strip" * self.strip + " shared" * self.shares


def teams(name: str, dtype: str, head_dim: int, access: str, strip: bool) -> int:
    """Teams of a block that read the same bias, as tiles.h has it."""
    if name == "backward_query":
        return 1 if not strip else 4 if head_dim <= (16 if dtype == "fp32" else 32) else 2
    return 2 if name == "backward_key" and access != "general" and head_dim <= 64 else 1


def describe(kernel: Kernel, arch: str) -> Row:
    symbol = kernel.symbol
    name = re.search(r"cuda\d+([a-z_]+)_kernel", symbol).group(1)
    dtype = re.search(r"DTypeE(\d)", symbol)
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", symbol)]
    head_dim = numbers[0] if numbers else 0
    found = re.search(r"BiasAccessE(\d)", symbol)
    access = ACCESS[int(found.group(1))] if found else ""
    strip = name == "backward_query" and "Lb1E" in symbol
    shares = name == "forward" and numbers[4] > 1  # Tile<type, head_dim, bias, warps, row tiles, block, group, stages>
    dtype = DTYPES[int(dtype[1])] if dtype else ""
    costs = [cost(loop, teams(name, dtype, head_dim, access, strip)) for loop in kernel.loops()]
    # The main loop is the one without a mask, the cheapest.
    best = min((c for c in costs if c), key=lambda c: c.slots, default=None)
    return Row(arch, dtype, head_dim, name, access, strip, shares, kernel, best)


def compile_and_read(arch: str, source: pathlib.Path, cuobjdump: str, folder: str) -> list[Row]:
    cubin = pathlib.Path(folder) / f"{source.stem}_{arch}.cubin"
    subprocess.run(["nvcc", "-std=c++20", "-O3", f"-arch={arch}", "-cubin", str(source), "-o", str(cubin)], check=True)
    return [describe(kernel, arch) for kernel in disassemble(cubin, cuobjdump)]


def instantiations(head_dims: list[int], dtypes: list[str]) -> list[pathlib.Path]:
    """The sources with kernels of these head_dims and dtypes, and the one for any."""
    wanted = re.compile(rf"_({'|'.join(dtypes)})_({'|'.join(map(str, head_dims))})$|^bias_workspace$")
    return sorted(p for p in (ROOT / "instantiations").glob("*.cu") if wanted.search(p.stem))


def broken_budgets(rows: list[Row]) -> list[str]:
    broken = []
    for row in rows:
        where = f"{row.arch} {row.dtype} {row.label}"
        spills = row.kernel.stack or row.kernel.count(*LOCAL)
        # Positions cost the backward a few registers that it does not have; how many bytes is in docs/decisions.
        few = row.label.startswith("backward") and row.kernel.stack <= BUDGETS["backward_stack_bytes"]
        few = few and not (row.dtype == "fp32" and row.head_dim <= BUDGETS["tf32_spill_free_up_to_head_dim"])
        if spills and not few and row.head_dim <= BUDGETS["spill_free_up_to_head_dim"]:
            broken.append(f"{where}: {row.kernel.stack} bytes of stack, {row.kernel.count(*LOCAL)} local accesses")
        if atomics := row.kernel.count(*ATOMICS):
            broken.append(f"{where}: {atomics} atomic instructions")
    counted = [r for r in rows if r.cost and (r.arch, r.dtype) == (BUDGET_ARCH, BUDGET_DTYPE)]
    for access in ("half", "float"):
        for head_dim, limit in BUDGETS["forward_slots"].items():
            for row in counted:
                if row.shares and (row.access, row.head_dim) == (access, int(head_dim)) and row.cost.slots > limit:
                    broken.append(f"{row.label}: {row.cost.slots:.2f} issue slots per element, at most {limit}")
        for head_dim, limit in BUDGETS["backward_slots"].items():
            slots = sum(row.cost.slots for row in backward(counted, access, int(head_dim)))
            if slots > limit:
                broken.append(f"backward D={head_dim} {access}: {slots:.2f} issue slots per element, at most {limit}")
        time, limit = backward_microseconds(counted, access), BUDGETS["backward_microseconds"][access]
        if time > limit:
            broken.append(f"backward at 512^3, {access} bias: {time:.0f} us, at most {limit}")
    return broken + broken_tf32_budgets(rows)


def broken_tf32_budgets(rows: list[Row]) -> list[str]:
    broken = []
    for head_dim, limits in BUDGETS["tf32_slots"].items():
        for row in tf32_step(rows, int(head_dim)):
            if row.cost.slots > limits[row.name]:
                broken.append(f"fp32 {row.label}: {row.cost.slots:.2f} issue slots per element, at most {limits[row.name]}")
    time, limit = tf32_microseconds(rows), BUDGETS["tf32_step_microseconds"]
    if time > limit:
        broken.append(f"fp32 step of 256^3, H=4, D=32: {time:.0f} us, at most {limit}")
    return broken


def tf32_step(rows: list[Row], head_dim: int) -> list[Row]:
    """The forward and the two backward kernels of a float32 call with bias."""
    rows = [r for r in rows if r.cost and (r.arch, r.dtype, r.head_dim) == (BUDGET_ARCH, "fp32", head_dim)]
    return [r for r in rows if r.access == "float" and (r.strip or r.name in ("forward", "backward_key"))]


def tf32_microseconds(rows: list[Row]) -> float:
    """A float32 step at 256 batch rows, queries and keys, 4 heads, head_dim 32."""
    return microseconds(tf32_step(rows, 32), 256)


def microseconds(rows: list[Row], n: int) -> float:
    """At n batch rows, queries and keys, 4 heads, if every kernel ran at its binding unit."""
    clocks = sum(row.cost.bounds[row.cost.binding] for row in rows)
    return n**3 * 4 * clocks / MULTIPROCESSORS / CLOCK * 1e6


def backward(rows: list[Row], access: str, head_dim: int) -> list[Row]:
    """The two kernels that give all gradients."""
    return [r for r in rows if (r.access, r.head_dim) == (access, head_dim) and (r.strip or r.name == "backward_key")]


def backward_microseconds(rows: list[Row], access: str) -> float:
    """At 512 batch rows, queries and keys, 4 heads, head_dim 32."""
    return microseconds(backward(rows, access, 32), 512)


def print_rows(rows: list[tuple[str, Kernel, Cost | None]]) -> None:
    counts = "slots | least | HMMA | exp2 | LDSM | RED | local"
    print(f"| kernel | registers | stack | {counts} | issue / exp2 / HMMA / shared / L2 | binds |")
    print("|---" * 12 + "|")
    for label, kernel, c in rows:
        figures = " | ".join("-" * 9)
        if c:
            counts = (c.slots, c.least, c.hmma, c.exp2, c.ldsm, c.reductions, c.local)
            units = " / ".join(f"{1000 * bound:.0f}" for bound in c.bounds.values())
            figures = " | ".join([*(f"{count:.2f}" for count in counts), units, c.binding])
        print(f"| {label} | {kernel.registers} | {kernel.stack} | {figures} |")
    print(flush=True)


def print_peers(arch: str, cuobjdump: str, head_dims: list[int]) -> None:
    found = list(sass_peers.sdpa(arch, cuobjdump))
    tried = sass_peers.trifast(arch, cuobjdump, head_dims)
    for _, same in itertools.groupby(tried, key=lambda peer: peer.label.split()[1:3]):  # a kernel at a head_dim
        # The cheapest of what it would try on a GPU.
        found.append(min(same, key=lambda peer: c.bounds[c.binding] if (c := peer_cost(*peer[1:])) else math.inf))
    print(f"{arch}, bf16: kernels of others; a loop within the main loop counts once\n")
    print_rows([(label, kernel, peer_cost(kernel, elements)) for label, kernel, elements in found])


def peer_cost(kernel: Kernel, elements: int | None = None) -> Cost | None:
    """Of the costliest loop over scores, since their unmasked loops are not told from others."""
    costs = [c for loop in kernel.loops() if (c := cost(loop, elements=elements))]
    return max(costs, key=lambda c: c.slots, default=None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["sm_80", "sm_90"], help="architectures to compile for")
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS, help="compiled head_dims to report")
    parser.add_argument("--dtypes", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument(
        "--jobs", type=int, default=int(os.environ.get("MAX_JOBS", os.cpu_count())), help="compilers at a time"
    )
    parser.add_argument("--peers", action="store_true", help="also the kernels of PyTorch and, if installed, trifast")
    parser.add_argument("--binary", type=pathlib.Path, help="report the kernels of this cubin instead")
    parser.add_argument("--only", default="", help="of --binary: a pattern of their symbols")
    arguments = parser.parse_args()
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None or (shutil.which("nvcc") is None and arguments.binary is None):
        print("sass_report: skipped, needs nvcc on the PATH and cuobjdump (of the CUDA toolkit or the triton wheel)")
        return 0
    if arguments.binary:
        kernels = disassemble(arguments.binary, cuobjdump, arguments.only)
        print_rows([(kernel.symbol[:60], kernel, peer_cost(kernel)) for kernel in kernels])
        return 0
    sources = instantiations(arguments.head_dims, arguments.dtypes)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        work = [(arch, source) for arch in arguments.archs for source in sources]
        rows = [row for found in pool.map(lambda w: compile_and_read(*w, cuobjdump, folder), work) for row in found]
    for arch in arguments.archs:
        for dtype in arguments.dtypes:
            print(f"{arch}, {dtype}: per score element and thread; milliclocks of each unit of an H100\n")
            print_rows([(r.label, r.kernel, r.cost) for r in rows if r.arch == arch and r.dtype in (dtype, "")])
        if arguments.peers:
            print_peers(arch, cuobjdump, arguments.head_dims)
    counted = [r for r in rows if r.cost and (r.arch, r.dtype) == (BUDGET_ARCH, BUDGET_DTYPE)]
    for access in ("half", "float"):
        if len(backward(counted, access, 32)) == 2:
            time = backward_microseconds(counted, access)
            print(f"backward at 512^3, H=4, D=32, {access} bias: {time:.0f} us at the binding units of an H100")
    if len(tf32_step(rows, 32)) == 3:
        print(f"float32 step at 256^3, H=4, D=32: {tf32_microseconds(rows):.0f} us at the binding units of an H100")
    broken = broken_budgets(rows)
    for line in broken:
        print(f"budget broken: {line}")
    print(f"{len(rows)} kernels, {len(broken)} budgets broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
