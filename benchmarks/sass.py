# SPDX-License-Identifier: BSD-3-Clause
"""Machine code of CUDA kernels: disassembly, loops, and what one score element costs in them."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import shutil
import subprocess
from collections.abc import Container

# One multiprocessor of an H100 per clock: 4 warp instructions (in threads), exponentials, bytes of shared memory and L1.
# mma.sync reaches about 65 % of the dense rate of 1024 bfloat16 multiply-adds per quarter, wgmma all of it. L2 gives 5.5
# TB/s to all.
MULTIPROCESSORS, CLOCK = 132, 1.755e9
ISSUE, EXP2, SHARED_BYTES, HMMA_CLOCKS, WGMMA_CLOCKS = 128, 16, 128, 1 / (32 * 0.65), 1 / 32
L2_BYTES = 5.5e12 / MULTIPROCESSORS / CLOCK

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
WGMMA = re.compile(r"HGMMA\.64x(\d+)x16\.")
ENDS = ("BRA", "BSYNC", "EXIT", "RET")
REDUCTIONS, LOCAL = ("RED", "REDG", "ATOM", "ATOMG"), ("LDL", "STL")
ATOMICS = (*REDUCTIONS, "ATOMS")  # with those in shared memory
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
            matrices = self.opcode.split(".")[-1]
            return int(matrices) if matrices.isdigit() else 1
        return 4 if "128" in self.opcode else 2 if "64" in self.opcode else 1

    @property
    def is_exp2(self) -> bool:
        return self.opcode.startswith("MUFU.EX2") and self.predicate != "!PT"

    @property
    def barrier(self) -> str:
        return self.operands.partition(",")[0].strip()

    def target(self) -> int | None:
        found = TARGET.search(self.operands.strip())
        return int(found.group(1), 16) if self.base in ("BRA", "BSSY") and found else None


@dataclasses.dataclass
class Loop:
    code: list[Instruction]
    least: int  # instructions of the shortest way round it that has its exponentials; branches skip the others


@dataclasses.dataclass
class Kernel:
    symbol: str
    registers: int
    stack: int
    code: list[Instruction]

    def count(self, *bases: str) -> int:
        return sum(i.base in bases and i.predicate != "!PT" for i in self.code)

    def after(self) -> list[list[int]]:
        """For each instruction those that may run next."""
        place = {i.address: n for n, i in enumerate(self.code)}
        joins: dict[str, int | None] = {}
        after: list[list[int]] = []
        for n, i in enumerate(self.code):
            target = i.target()
            if i.base == "BSSY":  # says where the BSYNC of its barrier goes on
                joins[i.barrier], target = target, None
            elif i.base == "BSYNC":
                target = joins.get(i.barrier)
            falls = i.base not in ENDS or i.predicate is not None or re.match(r"\s*!?U?P\d", i.operands)
            next_one = [n + 1] if falls and n + 1 < len(self.code) else []
            after.append([place[target], *next_one] if target in place else next_one)
        return after

    def loops(self) -> list[Loop]:
        """Those with exponentials that contain no other such, with the code out of line that may run in them: everything
        from which their last branch can be reached without passing their first instruction."""
        after = self.after()
        before: list[list[int]] = [[] for _ in self.code]
        latches: dict[int, list[int]] = collections.defaultdict(list)
        for n in {0, *ways(0, range(len(self.code)), after)}:
            for m in after[n]:
                before[m].append(n)
                if m <= n and self.code[n].base == "BRA":
                    latches[m].append(n)
        found = []
        for first, lasts in latches.items():
            body, pending = {first}, list(lasts)
            while pending:
                n = pending.pop()
                if n not in body:
                    body.add(n)
                    pending += before[n]
            if 0 not in body and any(self.code[n].is_exp2 for n in body):
                found.append((first, body))
        inner = [(first, body) for first, body in found if not any(b < body for _, b in found)]
        return [Loop([self.code[n] for n in sorted(body)], self.least(first, body, after)) for first, body in inner]

    def least(self, first: int, body: set[int], after: list[list[int]]) -> int:
        rounds = []
        for n in (n for n in body if self.code[n].is_exp2):
            way = {*shortest(first, n, body, after), *shortest(n, first, body, after)}
            rounds.append((-sum(self.code[m].is_exp2 for m in way), len(way)))
        return min(rounds)[1]


def ways(start: int, body: Container[int], after: list[list[int]]) -> dict[int, int]:
    """What can be reached within the body: {instruction: the one before it on a shortest way}."""
    came: dict[int, int] = {}
    reached = [start]
    for n in reached:
        for m in after[n]:
            if m in body and m not in came:
                came[m] = n
                reached.append(m)
    return came


def shortest(start: int, end: int, body: Container[int], after: list[list[int]]) -> list[int]:
    """The instructions of a shortest way, without the last."""
    came = ways(start, body, after)
    way = [came[end]]
    while way[-1] != start:
        way.append(came[way[-1]])
    return way


@dataclasses.dataclass
class Cost:
    """Per score element of a loop; instructions that a branch may skip are counted, but in `least`."""

    slots: float
    least: float
    hmma: float
    exp2: float
    ldsm: float
    reductions: float  # in global memory
    local: float
    bounds: dict[str, float]  # clocks per element and multiprocessor

    @property
    def binding(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)


def cost(loop: Loop, teams: int = 1, elements: int | None = None) -> Cost | None:
    """None for a loop without products. `teams` of a block load the same from global memory, once through L1. A thread has
    `elements` in one round, as many as exponentials unless given."""
    kinds: dict[str, float] = collections.Counter()
    for i in loop.code:
        kinds["slots"] += 1
        if i.predicate == "!PT":  # issued, but never executed
            continue
        if i.is_exp2:
            kinds["exp2"] += 1
        elif i.base == "HMMA":
            # m16n8k8 of TF32 takes as long as m16n8k16, of 16-bit operands half of it.
            kinds["hmma"] += 1 if "16816" in i.opcode or "TF32" in i.opcode else 0.5
        elif wide := WGMMA.match(i.opcode):  # four warps, each 16 of the 64 rows
            kinds["wgmma"] += int(wide[1]) / 8
        elif i.base == "LDSM":
            kinds["ldsm"] += 1
        elif i.base in REDUCTIONS:
            kinds["reductions"] += 1
        elif i.base in LOCAL:
            kinds["local"] += 1
        if i.base in ("LDSM", "LDS", "STS", "LDGSTS", "LDG", "LD", "STG", "ST", "SHFL"):
            kinds["shared"] += 4 * i.words
        if i.base in ("LDGSTS", "LDG", "LD", "STG", "ST"):
            kinds["L2"] += 4 * i.words / (teams if i.base in ("LDG", "LD") else 1)
    elements = elements or kinds["exp2"] // SCORES * SCORES
    if not elements or not kinds["hmma"] + kinds["wgmma"]:
        return None
    per = collections.Counter({name: value / elements for name, value in kinds.items()})
    bounds = {
        "issue": per["slots"] / ISSUE,
        "exp2": per["exp2"] / EXP2,
        "HMMA": per["hmma"] * HMMA_CLOCKS + per["wgmma"] * WGMMA_CLOCKS,
        "shared": per["shared"] / SHARED_BYTES,
        "L2": per["L2"] / L2_BYTES,
    }
    products = per["hmma"] + per["wgmma"]
    least = loop.least / elements
    return Cost(per["slots"], least, products, per["exp2"], per["ldsm"], per["reductions"], per["local"], bounds)


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
