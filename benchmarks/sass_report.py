#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA kernels cost per score element, read from their machine code: no GPU is needed.

Compiles the tensor-core kernels, disassembles them with cuobjdump (of the CUDA toolkit, or of the Triton wheel), finds the
main loop of each, and prints per kernel registers, spills and, per score element and thread: issue slots, tensor-core
instructions, exponentials, and what the busiest unit of an H100 takes. Instructions that a branch may skip are counted.
Exits with 1 when a budget is broken, and says so in one line when a tool is missing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ACCESS = ("none", "half", "float", "general")

# Budgets of issue slots per score element on sm_90, bfloat16, with bias, key mask and gate: {head_dim: slots}.
FORWARD_SLOTS = {16: 8.5, 32: 10.0}
BACKWARD_SLOTS = {16: 16.0, 32: 20.0}  # both kernels together
LARGEST_SPILL_FREE_HEAD_DIM = 64

# One multiprocessor of an H100 per clock: warp instructions, exponentials and bytes. mma.sync reaches about 65 % of the
# dense rate of 1024 bfloat16 multiply-adds per quarter.
ISSUE, EXP2, SHARED_BYTES, HMMA_CLOCKS = 128, 16, 128, 1 / (32 * 0.65)
MULTIPROCESSORS, CLOCK = 132, 1.755e9

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)([^;]*);")
WIDTHS = {"128": 4, "64": 2}


def find_tool(name: str) -> str | None:
    try:
        import triton

        bundled = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return shutil.which(name) or (str(bundled) if bundled.exists() else None)
    except ImportError:
        return shutil.which(name)


@dataclasses.dataclass
class Kernel:
    name: str  # forward, backward_query, ...
    head_dim: int
    access: str
    strip: bool
    group: int
    registers: int
    stack: int
    code: list[tuple[int, str | None, str, str]]  # address, predicate, opcode, operands

    @property
    def label(self) -> str:
        return f"{self.name} D={self.head_dim} {self.access}" + (" strip" if self.strip else "")

    def loops(self) -> list[list[tuple[int, str | None, str, str]]]:
        """Innermost loops: the code between a backward branch and its target that holds no other such branch."""
        spans = []
        for address, _, opcode, operands in self.code:
            target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip())
            if opcode.startswith("BRA") and target and int(target.group(1), 16) < address:
                spans.append((int(target.group(1), 16), address))
        inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
        return [[line for line in self.code if begin <= line[0] <= end] for begin, end in inner]

    def main_loop(self) -> list[tuple[int, str | None, str, str]]:
        """The loop that computes scores at the least cost: the one for tiles without a mask."""
        working = [loop for loop in self.loops() if count(loop)["EXP2"] and count(loop)["HMMA"]]
        return min(working, key=lambda loop: len(loop) / count(loop)["EXP2"], default=[])


def count(loop) -> collections.Counter:
    kinds = collections.Counter()
    for _, predicate, opcode, _ in loop:
        kinds["slots"] += 1
        if predicate == "!PT":  # never executed, yet issued
            continue
        base = opcode.split(".")[0]
        if opcode.startswith("MUFU.EX2"):
            kinds["EXP2"] += 1
        elif base == "HMMA":
            kinds["HMMA"] += 1 if "16816" in opcode else 0.5
        elif base in ("RED", "ATOM", "ATOMG", "ATOMS"):
            kinds["atomics"] += 1
        elif base in ("LDL", "STL"):
            kinds["local"] += 1
        if base in ("LDSM", "LDS", "STS", "LDGSTS", "LDG", "STG"):
            width = (
                int(opcode.split(".")[-1])
                if base == "LDSM"
                else WIDTHS.get(next((w for w in WIDTHS if w in opcode), ""), 1)
            )
            kinds["shared"] += width
        if base == "SHFL":
            kinds["shared"] += 1
    return kinds


@dataclasses.dataclass
class Cost:
    slots: float
    hmma: float
    exp2: float
    bounds: dict[str, float]  # clocks per element and multiprocessor
    atomics: int

    @property
    def binding(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)


def cost(kernel: Kernel, row_tiles: int, block: int) -> Cost | None:
    loop = kernel.main_loop()
    if not loop:
        return None
    kinds = count(loop)
    # A thread owns 16 * row_tiles * block / 32 scores of a tile, for every batch row of its group.
    elements = 16 * row_tiles * block / 32 * kernel.group
    per = {name: value / elements for name, value in kinds.items()}
    bounds = {
        "issue": per["slots"] / ISSUE,
        "exp2": per["EXP2"] / EXP2,
        "HMMA": per["HMMA"] * HMMA_CLOCKS,
        "shared": per.get("shared", 0) * 4 / SHARED_BYTES,
    }
    return Cost(per["slots"], per["HMMA"], per["EXP2"], bounds, kinds["atomics"])


def disassemble(source: pathlib.Path, arch: str, cuobjdump: str, folder: str) -> list[tuple[Kernel, int, int]]:
    cubin = pathlib.Path(folder) / f"{source.stem}_{arch}.cubin"
    subprocess.run(["nvcc", "-std=c++20", "-O3", f"-arch={arch}", "-cubin", str(source), "-o", str(cubin)], check=True)

    def run(option: str) -> str:
        return subprocess.run([cuobjdump, option, str(cubin)], capture_output=True, text=True, check=True).stdout

    usage = {
        m.group(1): (int(m.group(2)), int(m.group(3)))
        for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", run("-res-usage"))
    }
    found = []
    for part in run("-sass").split("Function : ")[1:]:
        symbol, _, body = part.partition("\n")
        name = re.search(r"cuda\d+(forward|backward_query|backward_key|backward_bias)_kernel", symbol)
        if name is None:
            continue
        numbers = [int(n) for n in re.findall(r"Li(\d+)E", symbol)]
        access = ACCESS[int(re.search(r"BiasAccessE(\d)", symbol).group(1))]
        strip = "Lb1E" in symbol and name.group(1) == "backward_query"
        code = [(int(m[1], 16), m[2], m[3], m[4]) for line in body.splitlines() if (m := INSTRUCTION.match(line))]
        registers, stack = usage[symbol.strip()]
        row_tiles, block, group = tile(name.group(1), numbers, access, strip)
        kernel = Kernel(name.group(1), numbers[0], access, strip, group, registers, stack, code)
        found.append((kernel, row_tiles, block))
    return found


def tile(name: str, numbers: list[int], access: str, strip: bool) -> tuple[int, int, int]:
    """Row tiles, block and group: written in a Tile's name; csrc/cuda/tiles.h derives those of the other two shapes."""
    if len(numbers) > 1:
        _, _, row_tiles, block, group, _ = numbers
        return row_tiles, block, group
    head_dim, general = numbers[0], access == "general"
    wide = head_dim <= 32 and not general
    if name == "backward_query":
        return 2 if wide else 1, 64 if head_dim == 32 and strip else 32, 2 if head_dim <= 16 and strip else 1
    small = general or head_dim > 64 or (head_dim == 32 and access == "none")
    return 2 if wide else 1, 32 if small else 64, 1


def check_budgets(rows: list[tuple[Kernel, Cost | None]], arch: str) -> list[str]:
    broken = [
        f"{k.label}: {k.stack} bytes of stack, none allowed up to head_dim {LARGEST_SPILL_FREE_HEAD_DIM}"
        for k, _ in rows
        if k.stack and k.head_dim <= LARGEST_SPILL_FREE_HEAD_DIM
    ]
    broken += [f"{k.label}: {c.atomics} atomic instructions in the main loop" for k, c in rows if c and c.atomics]
    if arch != "sm_90":
        return broken
    costs = {(k.name, k.head_dim, k.access, k.strip, k.group > 1): c for k, c in rows if c}
    for head_dim, limit in FORWARD_SLOTS.items():
        for access in ("half", "float"):
            c = costs.get(("forward", head_dim, access, False, True))
            if c and c.slots > limit:
                broken.append(f"forward D={head_dim} {access}: {c.slots:.2f} issue slots per element, at most {limit}")
    for head_dim, limit in BACKWARD_SLOTS.items():
        for access in ("half", "float"):
            pair = [
                c
                for (name, d, kind, strip, _), c in costs.items()
                if d == head_dim and kind == access and (strip or name == "backward_key")
            ]
            total = sum(c.slots for c in pair)
            if len(pair) == 2 and total > limit:
                broken.append(f"backward D={head_dim} {access}: {total:.2f} issue slots per element, at most {limit}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help="architectures to compile for")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[16, 32], help="compiled head_dims to report")
    arguments = parser.parse_args()
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None or shutil.which("nvcc") is None:
        print("sass_report: skipped, needs nvcc on the PATH and cuobjdump (of the CUDA toolkit or the triton wheel)")
        return 0
    broken = []
    for arch in arguments.arch:
        print(f"{arch}, bfloat16: per score element and thread\n")
        print("| kernel | registers | stack | slots | HMMA | exp2 | binding unit, milliclocks |")
        print("|---|---|---|---|---|---|---|")
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for head_dim in arguments.head_dim:
                for pass_name in ("forward", "backward"):
                    source = ROOT / "instantiations" / f"{pass_name}_bf16_{head_dim}.cu"
                    for kernel, row_tiles, block in disassemble(source, arch, cuobjdump, folder):
                        c = cost(kernel, row_tiles, block)
                        rows.append((kernel, c))
                        figures = "- | - | - | -"
                        if c:
                            bound = 1000 * c.bounds[c.binding]
                            figures = f"{c.slots:.2f} | {c.hmma:.2f} | {c.exp2:.2f} | {c.binding} {bound:.0f}"
                        group = f" x{kernel.group}" if kernel.group > 1 else ""
                        print(f"| {kernel.label}{group} | {kernel.registers} | {kernel.stack} | {figures} |", flush=True)
        broken += [f"{arch} {line}" for line in check_budgets(rows, arch)]
        print_backward_time(rows)
    for line in broken:
        print(f"budget broken: {line}")
    return 1 if broken else 0


def print_backward_time(rows: list[tuple[Kernel, Cost | None]]) -> None:
    """The whole backward at batch rows = Q = K = 512, 4 heads, head_dim 32, if every kernel ran at its binding unit."""
    elements = 512**3 * 4
    for access in ("half", "float"):
        parts = [
            c.bounds[c.binding]
            for k, c in rows
            if c and k.head_dim == 32 and k.access == access and (k.strip or k.name == "backward_key")
        ]
        if len(parts) == 2:
            microseconds = elements * sum(parts) / MULTIPROCESSORS / CLOCK * 1e6
            print(f"\nbackward at 512^3, H=4, D=32, {access} bias: {microseconds:.0f} us at the binding units of an H100")


if __name__ == "__main__":
    sys.exit(main())
