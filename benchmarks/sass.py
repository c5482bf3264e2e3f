# SPDX-License-Identifier: BSD-3-Clause
"""Machine code of CUDA kernels: disassembly, loops, and what one score element costs in them."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import shutil
import subprocess

# One multiprocessor of an H100 per clock: 4 warp instructions (in threads), exponentials, bytes of shared memory and L1.
# mma.sync reaches about 65 % of the dense rate of 1024 bfloat16 multiply-adds per quarter. L2 gives 5.5 TB/s to all.
MULTIPROCESSORS, CLOCK = 132, 1.755e9
ISSUE, EXP2, SHARED_BYTES, HMMA_CLOCKS = 128, 16, 128, 1 / (32 * 0.65)
L2_BYTES = 5.5e12 / MULTIPROCESSORS / CLOCK

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
ENDS = ("BRA", "EXIT", "RET")
# A thread owns a multiple of this many scores; the forward's few exponentials for rescaling are fewer.
SCORES = 16


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def words(self) -> int:
        """4-byte words a thread moves."""
        if self.base == "LDSM":
            return int(self.opcode.split(".")[-1])
        return 4 if "128" in self.opcode else 2 if "64" in self.opcode else 1

    def target(self) -> int | None:
        found = TARGET.search(self.operands.strip())
        return int(found.group(1), 16) if self.base == "BRA" and found else None


@dataclasses.dataclass
class Kernel:
    symbol: str
    registers: int
    stack: int
    code: list[Instruction]

    def count(self, *bases: str) -> int:
        return sum(i.base in bases and i.predicate != "!PT" for i in self.code)

    def loops(self) -> list[list[Instruction]]:
        """The innermost ones, with the code out of line that may run in them: everything from which their last branch can
        be reached without passing their first instruction."""
        place = {i.address: n for n, i in enumerate(self.code)}
        before: list[list[int]] = [[] for _ in self.code]
        latches: dict[int, list[int]] = collections.defaultdict(list)
        for n, i in enumerate(self.code):
            target = i.target()
            if target in place:
                before[place[target]].append(n)
                if target < i.address:
                    latches[place[target]].append(n)
            conditional = i.predicate is not None or re.match(r"\s*!?U?P\d", i.operands)
            if n + 1 < len(self.code) and (i.base not in ENDS or conditional):
                before[n + 1].append(n)
        found = []
        for first, lasts in latches.items():
            body, pending = {first}, list(lasts)
            while pending:
                n = pending.pop()
                if n not in body:
                    body.add(n)
                    pending += before[n]
            if 0 not in body:
                found.append(body)
        inner = [a for a in found if not any(b < a for b in found)]
        return [[self.code[n] for n in sorted(body)] for body in inner]


@dataclasses.dataclass
class Cost:
    """Per score element of a loop; instructions that a branch may skip are counted."""

    slots: float
    hmma: float
    exp2: float
    ldsm: float
    bounds: dict[str, float]  # clocks per element and multiprocessor

    @property
    def binding(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)


def cost(loop: list[Instruction], teams: int) -> Cost | None:
    """None for a loop without scores. `teams` of a block load the same from global memory, once through L1."""
    kinds: dict[str, float] = collections.Counter()
    for i in loop:
        kinds["slots"] += 1
        if i.predicate == "!PT":  # issued, but never executed
            continue
        if i.opcode.startswith("MUFU.EX2"):
            kinds["exp2"] += 1
        elif i.base == "HMMA":
            kinds["hmma"] += 1 if "16816" in i.opcode else 0.5
        elif i.base == "LDSM":
            kinds["ldsm"] += 1
        if i.base in ("LDSM", "LDS", "STS", "LDGSTS", "LDG", "LD", "STG", "ST", "SHFL"):
            kinds["shared"] += 4 * i.words
        if i.base in ("LDGSTS", "LDG", "LD", "STG", "ST"):
            kinds["L2"] += 4 * i.words / (teams if i.base in ("LDG", "LD") else 1)
    elements = kinds["exp2"] // SCORES * SCORES
    if not elements or not kinds["hmma"]:
        return None
    per = {name: value / elements for name, value in kinds.items()}
    bounds = {
        "issue": per["slots"] / ISSUE,
        "exp2": per["exp2"] / EXP2,
        "HMMA": per["hmma"] * HMMA_CLOCKS,
        "shared": per.get("shared", 0) / SHARED_BYTES,
        "L2": per.get("L2", 0) / L2_BYTES,
    }
    return Cost(per["slots"], per["hmma"], per["exp2"], per.get("ldsm", 0), bounds)


def find_tool(name: str) -> str | None:
    """Of the CUDA toolkit on the PATH, or of the Triton wheel."""
    try:
        import triton

        bundled = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return shutil.which(name) or (str(bundled) if bundled.exists() else None)
    except ImportError:
        return shutil.which(name)


def disassemble(binary: pathlib.Path, cuobjdump: str, only: str = "") -> list[Kernel]:
    """The kernels of a cubin whose symbols match `only`."""

    def run(option: str) -> str:
        return subprocess.run([cuobjdump, option, str(binary)], capture_output=True, text=True, check=True).stdout

    usage = {
        m.group(1): (int(m.group(2)), int(m.group(3)))
        for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", run("-res-usage"))
    }
    found = []
    for part in run("-sass").split("Function : ")[1:]:
        symbol, _, body = part.partition("\n")
        if re.search(only, symbol) and symbol.strip() in usage:
            lines = (INSTRUCTION.match(line) for line in body.splitlines())
            code = [Instruction(int(m[1], 16), m[2], m[3], m[4]) for m in lines if m]
            found.append(Kernel(symbol.strip(), *usage[symbol.strip()], code))
    return found
