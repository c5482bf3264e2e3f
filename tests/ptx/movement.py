# SPDX-License-Identifier: BSD-3-Clause
"""Loads, stores and asynchronous copies."""

from __future__ import annotations

import re

import numpy as np

from .faults import Fault
from .memory import RAW
from .operands import TYPES, Run, address, opcode, reader, vector, writer
from .parser import Instruction, Kernel, Unsupported

KIND = r"([bus](?:8|16|32|64)|f32|f64)"


def counted(text: str, count: str | None) -> list[str]:
    names = vector(text)
    if len(names) != int(count or 1):
        raise Unsupported(f"{text} as {count} elements")
    return names


@opcode(rf"ld\.param(?:\.v([24]))?\.{KIND}")
def load_parameter(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    names, kind, at = counted(instruction.operands[0], found[1]), TYPES[found[2]], address(kernel, instruction.operands[1])
    writers = [writer(kernel, name) for name in names]

    size = kind.itemsize * len(writers)

    def run(machine, active) -> None:
        threads, where = machine.active_addresses(at, active)
        if (bad := (where < 0) | (where > len(machine.parameters) - size) | (where % size != 0)).any():
            raise Fault(
                f"a read of parameters out of bounds or misaligned, {size} bytes at {where[bad][0]}", threads[bad][0]
            )
        same = bool((where == where[0]).all())
        values = machine.parameters[(where[:1] if same else where)[:, None] + np.arange(size)].view(kind)
        for i, write in enumerate(writers):
            write(machine, values[0, i] if same else machine.spread(values[:, i], threads, active), active)

    return run


@opcode(rf"ld(?:\.volatile)?(?:\.(global|shared))?(?:\.nc)?(?:\.v([24]))?\.{KIND}")
def load(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    """A generic address is one of global memory: no kernel makes one of shared memory."""
    space, count, kind = found.groups()
    at, dtype = address(kernel, instruction.operands[1]), TYPES[kind]
    writers = [writer(kernel, name) for name in counted(instruction.operands[0], count)]
    if space == "shared" and dtype.itemsize < 4:
        raise Unsupported(f"line {instruction.line}: {instruction.text}")

    def run(machine, active) -> None:
        threads, where = machine.active_addresses(at, active)
        if space != "shared":
            values = machine.memory.load(where, dtype.itemsize, len(writers), threads)
        else:
            words = machine.shared.load(where, len(writers) * dtype.itemsize // 4, threads, instruction)
            values = words.view(RAW[dtype.itemsize])
        for i, write in enumerate(writers):
            write(machine, machine.spread(values[:, i], threads, active).view(dtype), active)

    return run


@opcode(rf"st(?:\.volatile)?\.(global|shared)(?:\.v([24]))?\.{KIND}")
def store(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    space, count, kind = found.groups()
    at = address(kernel, instruction.operands[0])
    bits, size = f"b{kind[1:]}", int(kind[1:]) // 8
    reads = [reader(kernel, name, kind if name[0] != "%" else bits) for name in counted(instruction.operands[1], count)]
    if size < (4 if space == "shared" else 2):
        raise Unsupported(f"line {instruction.line}: {instruction.text}")

    def run(machine, active) -> None:
        threads, where = machine.active_addresses(at, active)
        values = np.empty((len(threads), len(reads)), RAW[size])
        for i, read in enumerate(reads):
            value = read(machine).view(RAW[size])
            values[:, i] = value if value.ndim == 0 else value[threads]
        if space == "global":
            machine.memory.store(where, values, threads)
        else:
            machine.shared.store(where, values.view(np.uint32), threads, instruction)

    return run


@opcode(r"cp\.async\.cg\.shared\.global")
def copy_async(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    """16 bytes, of which the last operand says how many are read, or, a predicate, that none are; the rest is zero."""
    to, source, size, *rest = instruction.operands
    if size != "16" or len(rest) > 1:
        raise Unsupported(f"line {instruction.line}: {instruction.text}")
    to, source = address(kernel, to), address(kernel, source)
    ignores = bool(rest) and not rest[0].isdigit() and kernel.width(rest[0]) == 0
    last = reader(kernel, rest[0], "pred" if ignores else "u32") if rest else lambda machine: np.uint32(16)

    def run(machine, active) -> None:
        threads, where = machine.active_addresses(to, active)
        value = last(machine)
        lengths = np.broadcast_to(np.where(value, 0, 16) if ignores else value, machine.count)[threads].astype(np.int64)
        if (lengths > 16).any():
            raise Unsupported("cp.async of more than 16 bytes")
        data = np.zeros((len(threads), 16), np.uint8)
        at = source(machine)[threads]
        for length in np.unique(lengths[lengths > 0]):
            which = np.flatnonzero(lengths == length)
            machine.memory.check_aligned(at[which], 16, threads[which])
            width = min(int(length & -length), 8)  # divides the length; the widest element that there is
            for part in range(0, int(length), width):
                piece = machine.memory.load(at[which] + part, width, 1, threads[which])
                data[which, part : part + width] = piece.view(np.uint8)
        machine.shared.begin_copy(where, data.view(np.uint32), threads, instruction)

    return run


@opcode(r"cp\.async\.commit_group")
def commit(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    return lambda machine, active: machine.shared.commit(machine.active_threads(active))


@opcode(r"cp\.async\.wait_group")
def wait(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    pending = int(instruction.operands[0])
    return lambda machine, active: machine.shared.wait(pending, machine.active_threads(active))
