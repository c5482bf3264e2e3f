# SPDX-License-Identifier: BSD-3-Clause
"""Operands of instructions as functions of the machine, and the table of the opcodes' handlers.

A value is an array with an element for each thread, or, where it is the same for all, a scalar. Registers hold unsigned
integers of their width; an instruction looks at them as its type. No array is ever changed in place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import RAW
from .parser import Instruction, Kernel, Unsupported
from .shared import BASE

if TYPE_CHECKING:
    from .machine import Machine

Value = Any  # an array or a scalar
Read = Callable[["Machine"], Value]
Run = Callable[["Machine", np.ndarray | None], None]  # on the active threads; None: on all
Handler = Callable[[Kernel, Instruction, re.Match], Run]

TYPES = {
    f"{kind}{8 * size}": np.dtype(f"{kind.replace('b', 'u').replace('s', 'i')}{size}") for kind in "bus" for size in RAW
}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
HANDLERS: list[tuple[re.Pattern, Handler]] = []


def opcode(pattern: str) -> Callable[[Handler], Handler]:
    """For opcodes that the pattern matches as a whole: a modifier that it does not name is not supported."""

    def register(handler: Handler) -> Handler:
        HANDLERS.append((re.compile(pattern), handler))
        return handler

    return register


@functools.cache
def find_handler(code: str) -> tuple[Handler, re.Match] | None:
    for pattern, handler in HANDLERS:
        if found := pattern.fullmatch(code):
            return handler, found
    return None


def compile_instruction(kernel: Kernel, instruction: Instruction) -> Run:
    known = find_handler(instruction.opcode)
    if known is None:
        raise Unsupported(f"{kernel.name}, line {instruction.line}: {instruction.text}")
    return known[0](kernel, instruction, known[1])


def slot(kernel: Kernel, register: str) -> int:
    """Where the machine keeps it; registers are numbered as they are met."""
    kernel.width(register)  # raises for what is none
    return kernel.slots.setdefault(register, len(kernel.slots))


def constant(text: str, kind: np.dtype) -> Value:
    if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
        bits = np.uint32(int(found[1], 16)) if found[1] else np.uint64(int(found[2], 16))
        if bits.dtype.itemsize != kind.itemsize:
            raise Unsupported(f"{text} as {kind}")
        return bits.view(kind)
    if not re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        raise Unsupported(f"operand {text}")
    number = int(text.rstrip("U"), 0)
    if kind.kind == "b":
        return np.bool_(number != 0)
    return RAW[kind.itemsize](number & (2 ** (8 * kind.itemsize) - 1)).view(kind)


SPECIAL = {"%tid.x": "thread", "%ctaid.x": "block", "%ntid.x": "block_size", "%laneid": "lane"}


def reader(kernel: Kernel, text: str, kind: str) -> Read:
    """The operand as a value of this type."""
    if (text, kind) not in kernel.readers:
        kernel.readers[text, kind] = make_reader(kernel, text, kind)
    return kernel.readers[text, kind]


def make_reader(kernel: Kernel, text: str, kind: str) -> Read:
    dtype = TYPES[kind]
    if text in SPECIAL:
        return lambda machine: getattr(machine, SPECIAL[text]).astype(dtype)
    if text in (kernel.parameter, kernel.dynamic_shared):
        base = dtype.type(0 if text == kernel.parameter else BASE)
        return lambda machine: base
    if text[0] != "%" and text not in kernel.widths:
        value = constant(text, dtype)
        return lambda machine: value
    place, width = slot(kernel, text), kernel.width(text)
    if (width == 0) != (kind == "pred"):
        raise Unsupported(f"{text} as {kind}")

    kind = RAW[width] if width else np.bool_
    poison = kind(-1 & (2 ** (8 * width) - 1))  # the compiler does select from registers that nothing was written to

    def read(machine: Machine) -> Value:
        value = machine.registers[place]
        return (poison if value is None else value).view(dtype)

    def read_low_part(machine: Machine) -> Value:
        value = machine.registers[place]
        return (poison if value is None else value).astype(RAW[dtype.itemsize]).view(dtype)

    if width in (0, dtype.itemsize):
        return read
    if width < dtype.itemsize:
        raise Unsupported(f"{text} as {kind}")
    return read_low_part


def writer(kernel: Kernel, register: str) -> Callable[[Machine, Value, np.ndarray | None], None]:
    """Puts a value into a register, extended by its sign if it is narrower and signed."""
    if register == "_":
        return lambda machine, value, active: None
    place, width = slot(kernel, register), kernel.width(register)
    kind = RAW[width] if width else np.bool_

    def write(machine: Machine, value: Value, active: np.ndarray | None) -> None:
        if value.dtype.itemsize == max(width, 1):
            value = value.view(kind)
        elif value.dtype.kind in "iu" and value.dtype.itemsize < width:
            value = value.astype(kind)  # C's conversion: two's complement
        else:
            raise Unsupported(f"{value.dtype} into {register}")
        if active is not None:
            before = machine.registers[place]
            value = np.where(active, value, kind(-1 & (2 ** (8 * width) - 1)) if before is None else before)
        elif value.ndim == 0:
            value = np.full(machine.count, value)
        machine.registers[place] = value

    return write


def vector(text: str) -> list[str]:
    """The registers of {a, b}, or the one register."""
    return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]


def address(kernel: Kernel, text: str) -> Read:
    """int64 addresses; those of parameters count from the struct's first byte."""
    found = re.fullmatch(r"\[\s*([^+\]\s]+?)\s*(?:\+\s*(-?\d+))?\s*\]", text)
    if found is None:
        raise Unsupported(f"address {text}")
    offset, base = int(found[2] or 0), found[1]
    read = reader(kernel, base, f"b{8 * kernel.width(base)}" if base[0] == "%" else "b32")
    return lambda machine: read(machine).astype(np.int64) + offset


def elementwise(kernel: Kernel, instruction: Instruction, kinds: Sequence[str], function: Callable[..., Value]) -> Run:
    """Reads operands of these types, writes one result of the type that it has."""
    target, *sources = instruction.operands
    if len(sources) != len(kinds):
        raise Unsupported(f"line {instruction.line}: {instruction.text}")
    reads = [reader(kernel, text, kind) for text, kind in zip(sources, kinds, strict=True)]
    write = writer(kernel, target)

    def run(machine: Machine, active: np.ndarray | None) -> None:
        write(machine, function(*[read(machine) for read in reads]), active)

    return run
