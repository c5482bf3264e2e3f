# SPDX-License-Identifier: BSD-3-Clause
"""What the lanes of a warp do together: votes, shuffles, matrix loads and products.

Layouts are those of the PTX manual for 8x8 matrices of 16-bit elements and for mma.m16n8k16: lane l holds row l / 4 and
columns 2 * (l % 4) and that + 1 of every 8x8 matrix.
"""

from __future__ import annotations

import re

import numpy as np

from .faults import Fault
from .operands import Run, Value, address, opcode, reader, vector, writer
from .parser import Instruction, Kernel, Unsupported

LANE = np.arange(32)


def whole_warps(machine, active) -> None:
    """The lanes of a warp execute the instruction together or not at all."""
    if active is None:
        return
    lanes = active.reshape(-1, 32)
    together = lanes.all(1) | ~lanes.any(1)
    if not together.all():
        warp = np.flatnonzero(~together)[0]
        missing = np.flatnonzero(~lanes[warp])[0]
        raise Fault(f"lanes of a warp are elsewhere, as lane {missing}", warp * 32 + np.flatnonzero(lanes[warp])[0])


def fixed(kernel: Kernel, instruction: Instruction, operand: int, value: int) -> Run:
    """A check that an operand has the only value that is supported."""
    read = reader(kernel, instruction.operands[operand], "u32")

    def check(machine, active) -> None:
        given = read(machine)
        if (given != value).any() if active is None or given.ndim == 0 else (given[active] != value).any():
            raise Unsupported(f"{kernel.name}, line {instruction.line}: {instruction.text}: not {value}")

    return check


def every_lane(kernel: Kernel, instruction: Instruction) -> Run:
    """A check that the lanes are all that the instruction asks for, which is all."""
    check = fixed(kernel, instruction, -1, 0xFFFFFFFF)

    def run(machine, active) -> None:
        check(machine, active)
        whole_warps(machine, active)

    return run


@opcode(r"bar\.warp\.sync")
def sync_warp(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    together = every_lane(kernel, instruction)

    def run(machine, active) -> None:
        together(machine, active)
        machine.shared.sync_warps(machine.active_threads(active))

    return run


@opcode(r"vote\.sync\.(any|all|ballot)\.(pred|b32)")
def vote(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    together = every_lane(kernel, instruction)
    text = instruction.operands[1]
    negated, text = text.startswith("!"), text.lstrip("!")
    read, write = reader(kernel, text, "pred"), writer(kernel, instruction.operands[0])
    if (found[1] == "ballot") != (found[2] == "b32"):
        raise Unsupported(f"line {instruction.line}: {instruction.text}")

    def run(machine, active) -> None:
        together(machine, active)
        votes = np.broadcast_to(read(machine) != negated, machine.count).reshape(-1, 32)
        if found[1] == "ballot":
            result = (votes.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
        else:
            result = votes.any(1) if found[1] == "any" else votes.all(1)
        write(machine, np.repeat(result, 32), active)

    return run


@opcode(r"shfl\.sync\.(bfly|idx)\.b32")
def shuffle(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    target, source, lanes, *_ = instruction.operands
    together, whole = every_lane(kernel, instruction), fixed(kernel, instruction, 3, 31)
    target, *predicate = target.split("|")
    read, number = reader(kernel, source, "b32"), reader(kernel, lanes, "u32")
    writers = [(writer(kernel, target), None), *((writer(kernel, name), np.bool_(True)) for name in predicate)]

    def run(machine, active) -> None:
        whole(machine, active)
        together(machine, active)
        given = np.broadcast_to(read(machine), machine.count)
        by = np.broadcast_to(number(machine), machine.count).astype(np.int64)
        beyond = by > 31 if active is None else active & (by > 31)
        if beyond.any():
            raise Fault("a shuffle beyond the warp", np.flatnonzero(beyond)[0])
        lane = machine.lane.astype(np.int64)
        from_lane = (lane ^ by if found[1] == "bfly" else by) & 31
        value = given[np.arange(machine.count) - lane + from_lane]
        for write, fixed in writers:
            write(machine, value if fixed is None else fixed, active)

    return run


def to_fragments(matrices: np.ndarray) -> np.ndarray:
    """[warps, 8, 8] 16-bit elements to a word for each thread."""
    return np.ascontiguousarray(matrices).view(np.uint32).reshape(-1)


def from_fragments(words: Value) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint16).reshape(-1, 8, 8)


@opcode(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
def load_matrices(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    names, count = vector(instruction.operands[0]), int(found[1])
    if len(names) != count:
        raise Unsupported(f"line {instruction.line}: {instruction.text}")
    at, writers = address(kernel, instruction.operands[1]), [writer(kernel, name) for name in names]

    def run(machine, active) -> None:
        whole_warps(machine, active)
        threads, where = machine.active_addresses(at, active)
        gives = threads % 32 < 8 * count
        rows = machine.shared.load(where[gives], 4, threads[gives], instruction)
        matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if found[2]:
            matrices = matrices.transpose(0, 1, 3, 2)
        for i, write in enumerate(writers):
            write(machine, machine.spread(to_fragments(matrices[:, i]), threads, active), active)

    return run


@opcode(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16")
def transpose_matrix(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    target, source = instruction.operands
    read, write = reader(kernel, source, "b32"), writer(kernel, target)

    def run(machine, active) -> None:
        whole_warps(machine, active)
        words = np.broadcast_to(read(machine), machine.count)
        write(machine, to_fragments(from_fragments(words).transpose(0, 2, 1)), active)

    return run


def to_float(halves: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return halves.view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def read_all(machine, reads) -> np.ndarray:
    """[operands, threads]"""
    result = np.empty((len(reads), machine.count), reads[0](machine).dtype)
    for i, read in enumerate(reads):
        result[i] = read(machine)
    return result


def read_accumulators(machine, reads) -> np.ndarray:
    """[warps, 16, 8]"""
    halves = read_all(machine, reads).reshape(2, 2, -1, 8, 4)  # row half, column of the pair, warp, lane / 4, lane % 4
    return halves.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)


def write_accumulators(machine, active, writers, result: np.ndarray) -> None:
    halves = result.astype(np.float32).reshape(-1, 2, 8, 4, 2)
    for write, value in zip(writers, halves.transpose(1, 4, 0, 2, 3).reshape(4, -1), strict=True):
        write(machine, value, active)


@opcode(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32")
def multiply(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    """Exact products, summed in float64 and rounded once; the order and the rounding of a GPU are not documented."""
    d, a, b, c = (vector(text) for text in instruction.operands)
    if [len(x) for x in (d, a, b, c)] != [4, 4, 2, 4]:
        raise Unsupported(f"line {instruction.line}: {instruction.text}")
    a, b = ([reader(kernel, name, "b32") for name in names] for names in (a, b))
    c, writers = [reader(kernel, name, "f32") for name in c], [writer(kernel, name) for name in d]

    def run(machine, active) -> None:
        whole_warps(machine, active)
        # Indices of a word: (column half, row half), warp, lane / 4, lane % 4; then the half of the word.
        left = read_all(machine, a).view(np.uint16).reshape(2, 2, -1, 8, 4, 2)
        right = read_all(machine, b).view(np.uint16).reshape(2, -1, 8, 4, 2)
        left = to_float(left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16), found[1])
        right = to_float(right.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8), found[1])
        write_accumulators(machine, active, writers, left @ right + read_accumulators(machine, c))

    return run


@opcode(r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32")
def multiply_tf32(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    """As multiply(). What the lower bits of an operand do is not documented: there must be none."""
    d, a, b, c = (vector(text) for text in instruction.operands)
    if [len(x) for x in (d, a, b, c)] != [4, 4, 2, 4]:
        raise Unsupported(f"line {instruction.line}: {instruction.text}")
    a, b, c = ([reader(kernel, name, "f32") for name in names] for names in (a, b, c))
    writers = [writer(kernel, name) for name in d]

    def run(machine, active) -> None:
        whole_warps(machine, active)
        left, right = read_all(machine, a), read_all(machine, b)
        for operand in (left, right):
            low = ((operand.view(np.uint32) & np.uint32(0x1FFF)) != 0) & ~np.isnan(operand)
            if (low := low.any(0) if active is None else low.any(0) & active).any():
                raise Fault("an operand that is no TF32 number", np.flatnonzero(low)[0])
        # Indices: column half, row half, warp, lane / 4, lane % 4.
        left = left.reshape(2, 2, -1, 8, 4).transpose(2, 1, 3, 0, 4).reshape(-1, 16, 8).astype(np.float64)
        right = right.reshape(2, -1, 8, 4).transpose(1, 0, 3, 2).reshape(-1, 8, 8).astype(np.float64)
        write_accumulators(machine, active, writers, left @ right + read_accumulators(machine, c))

    return run
