# SPDX-License-Identifier: BSD-3-Clause
"""What instructions compute that look at one thread only."""

from __future__ import annotations

import re

import numpy as np

from .memory import RAW
from .operands import TYPES, Run, Value, elementwise, opcode, reader, vector, writer
from .parser import Instruction, Kernel

INTEGER = r"([us](?:16|32|64))"
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def simple(pattern: str, arity: int, function) -> None:
    """An opcode whose last modifier is the type of all operands and of the result."""

    @opcode(pattern)
    def handle(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
        return elementwise(kernel, instruction, [found[1]] * arity, function)


ANY = r"([us](?:16|32|64)|f32|f64)"
simple(rf"add(?:\.rn)?\.{ANY}", 2, np.add)
simple(rf"sub(?:\.rn)?\.{ANY}", 2, np.subtract)
simple(r"mul(?:\.rn)?\.(f32|f64)", 2, np.multiply)
simple(rf"mul\.lo\.{INTEGER}", 2, np.multiply)
simple(rf"mad\.lo\.{INTEGER}", 3, lambda x, y, z: x * y + z)
simple(rf"min\.{INTEGER}", 2, np.minimum)
simple(rf"max\.{INTEGER}", 2, np.maximum)
simple(r"min\.(f32|f64)", 2, np.fmin)  # of a number and NaN the number
simple(r"max\.(f32|f64)", 2, np.fmax)
simple(r"and\.(pred|b16|b32|b64)", 2, np.bitwise_and)
simple(r"or\.(pred|b16|b32|b64)", 2, np.bitwise_or)
simple(r"xor\.(pred|b16|b32|b64)", 2, np.bitwise_xor)
simple(r"not\.(pred|b16|b32|b64)", 1, np.invert)
simple(r"neg\.(s16|s32|s64|f32|f64)", 1, np.negative)
simple(r"abs\.(s16|s32|s64|f32|f64)", 1, np.abs)
simple(r"(?:div\.rn|div\.full|div\.approx)\.(f32)", 2, np.divide)
simple(r"div\.rn\.(f64)", 2, np.divide)
simple(r"rcp\.(?:rn|approx)\.(f32)", 1, lambda x: x.dtype.type(1) / x)
simple(r"rcp\.rn\.(f64)", 1, lambda x: x.dtype.type(1) / x)
simple(r"lg2\.approx\.(f32)", 1, np.log2)


def divide(x: Value, y: Value) -> Value:
    """Toward zero, as C does; by zero: all bits set."""
    quotient = np.floor_divide(np.abs(x), np.abs(y)).astype(x.dtype)
    if x.dtype.kind == "i":
        quotient = np.where((x < 0) != (y < 0), -quotient, quotient)
    return np.where(y == 0, np.invert(x.dtype.type(0)), quotient)


simple(rf"div\.{INTEGER}", 2, divide)
simple(rf"rem\.{INTEGER}", 2, lambda x, y: x - divide(x, y) * y)


@opcode(r"mul\.hi\.([us]32)")
def multiply_high(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    wide = TYPES[WIDER[found[1]]]

    def high(x: Value, y: Value) -> Value:
        return (x.astype(wide) * y.astype(wide) >> wide.type(32)).astype(TYPES[found[1]])

    return elementwise(kernel, instruction, [found[1]] * 2, high)


@opcode(r"mul\.hi\.s64")
def multiply_high_64(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    half, low = np.int64(32), np.int64(0xFFFFFFFF)

    def high(x: Value, y: Value) -> Value:
        (a, b), (c, d) = ((v >> half, v & low) for v in (x, y))
        bottom = ((b * d).view(np.uint64) >> np.uint64(32)).view(np.int64)
        first = a * d + bottom
        second = b * c + (first & low)
        return a * c + (first >> half) + (second >> half)

    return elementwise(kernel, instruction, ["s64"] * 2, high)


@opcode(r"(mul|mad)\.wide\.([us](?:16|32))")
def multiply_wide(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    wide = TYPES[WIDER[found[2]]]

    def product(x: Value, y: Value, *added: Value) -> Value:
        return x.astype(wide) * y.astype(wide) + (added[0] if added else wide.type(0))

    kinds = [found[2]] * 2 + [WIDER[found[2]]] * (found[1] == "mad")
    return elementwise(kernel, instruction, kinds, product)


def fused(x: Value, y: Value, z: Value) -> Value:
    """x * y + z in float64, inexact sums rounded so that rounding them again to float32 gives the same as rounding once:
    where the last bits look like a tie or like an exact number, they are moved toward the true sum."""
    product = x.astype(np.float64) * y.astype(np.float64)  # exact
    total = product + z
    doubtful = total.view(np.int64) & 0x0FFFFFFF == 0
    if not doubtful.any():
        return total
    part = total - product
    error = (product - (total - part)) + (z - part)
    step = np.where((error > 0) == (total > 0), 1, -1) * (doubtful & (error != 0) & np.isfinite(total))
    return (total.view(np.int64) + step).view(np.float64)


def toward_zero(exact: Value) -> Value:
    nearest = exact.astype(np.float32)
    beyond = np.isfinite(exact) & (np.abs(nearest.astype(np.float64)) > np.abs(exact))
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


@opcode(r"fma\.(rn|rz)\.f32")
def fused_multiply_add(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    if found[1] == "rz":
        return elementwise(kernel, instruction, ["f32"] * 3, lambda x, y, z: toward_zero(fused(x, y, z)))
    return elementwise(kernel, instruction, ["f32"] * 3, lambda x, y, z: fused(x, y, z).astype(np.float32))


@opcode(r"mul\.rz\.f32")
def multiply_toward_zero(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    return elementwise(kernel, instruction, ["f32"] * 2, lambda x, y: toward_zero(x.astype(np.float64) * y))


def flush(x: Value) -> Value:
    """Subnormal numbers to zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


@opcode(r"rcp\.approx\.ftz\.f32")
def reciprocal(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    return elementwise(kernel, instruction, ["f32"], lambda x: flush(np.float32(1) / flush(x)))


@opcode(r"ex2\.approx\.ftz\.f32")
def exp2(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    return elementwise(kernel, instruction, ["f32"], lambda x: flush(np.exp2(flush(x))))


@opcode(r"(shl|shr)\.([bus])(16|32|64)")
def shift(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    operation = np.left_shift if found[1] == "shl" else np.right_shift
    kind, bits = TYPES[found[2] + found[3]], int(found[3])

    def shifted(x: Value, amount: Value) -> Value:
        result = operation(x, np.minimum(amount, np.uint32(bits - 1)).astype(kind))
        return result if kind.kind == "i" else np.where(amount >= bits, kind.type(0), result)

    return elementwise(kernel, instruction, [found[2] + found[3], "u32"], shifted)


@opcode(r"popc\.b32")
def count_bits(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    return elementwise(kernel, instruction, ["b32"], lambda x: np.bitwise_count(x).astype(np.uint32))


@opcode(r"bfi\.b(32|64)")
def insert_bits(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    kind = RAW[int(found[1]) // 8]

    def inserted(x: Value, y: Value, position: Value, length: Value) -> Value:
        field = ((kind(1) << length.astype(kind)) - kind(1)) << position.astype(kind)
        return (y & ~field) | ((x << position.astype(kind)) & field)

    return elementwise(kernel, instruction, [f"b{found[1]}"] * 2 + ["u32"] * 2, inserted)


@opcode(r"selp\.([bus](?:16|32|64)|f32|f64)")
def select(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    return elementwise(kernel, instruction, [found[1]] * 2 + ["pred"], lambda x, y, p: np.where(p, x, y))


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name: str, kind: str):
    """NaN makes comparisons false, and true those whose names end in u."""
    if kind[0] != "f":
        return COMPARE[name]
    if name in ("num", "nan"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (name == "nan")
    base, unordered = COMPARE[name[:2]], name.endswith("u")
    if unordered:
        return lambda x, y: base(x, y) | np.isnan(x) | np.isnan(y)
    return lambda x, y: base(x, y) & ~(np.isnan(x) | np.isnan(y))


@opcode(r"setp\.(eq|ne|lt|le|gt|ge)(?:\.(and|or|xor))?\.([bus](?:16|32|64))")
@opcode(r"setp\.((?:eq|ne|lt|le|gt|ge)u?|num|nan)(?:\.(and|or|xor))?\.(f32|f64)")
def set_predicate(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    name, combine, kind = found.groups()
    compare = comparison(name, kind)
    if combine is None:
        return elementwise(kernel, instruction, [kind] * 2, compare)
    both = COMBINE[combine]
    return elementwise(kernel, instruction, [kind] * 2 + ["pred"], lambda x, y, p: both(compare(x, y), p))


INTEGERS = r"[us](?:8|16|32|64)"


@opcode(rf"cvt\.({INTEGERS})\.({INTEGERS})")
@opcode(r"cvt\.(f32)\.(f16)")
@opcode(r"cvt\.(f64)\.(f32)")
@opcode(r"cvt\.rn\.(f32|f64)\.([us](?:32|64)|f64)")
def convert(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    to, source = found.groups()
    return elementwise(kernel, instruction, [source], lambda x: x.astype(TYPES[to]))


def bfloat16_bits(x: Value) -> Value:
    """float32 to nearest even, as uint32; the NaN of the device."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def float16_bits(x: Value) -> Value:
    return np.where(np.isnan(x), np.uint32(0x7FFF), x.astype(np.float16).view(np.uint16).astype(np.uint32))


@opcode(r"cvt\.rn\.(bf16|f16)x2\.f32")
def pack(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    bits = bfloat16_bits if found[1] == "bf16" else float16_bits
    return elementwise(kernel, instruction, ["f32"] * 2, lambda high, low: bits(high) << np.uint32(16) | bits(low))


@opcode(r"mov\.(pred|[bus](?:16|32|64)|f32|f64)")
def move(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    target, source = instruction.operands
    size = 0 if found[1] == "pred" else int(found[1][1:])
    if target.startswith("{"):
        return split_word(kernel, target, source, size)
    if source.startswith("{"):
        return join_words(kernel, target, source, size)
    return elementwise(kernel, instruction, [found[1]], lambda x: x)


def split_word(kernel: Kernel, target: str, source: str, size: int) -> Run:
    writers = [writer(kernel, name) for name in vector(target)]
    part = size // len(writers)
    read = reader(kernel, source, f"b{size}")

    def run(machine, active) -> None:
        word = read(machine)
        for i, write in enumerate(writers):
            write(machine, (word >> word.dtype.type(i * part)).astype(RAW[part // 8]), active)

    return run


def join_words(kernel: Kernel, target: str, source: str, size: int) -> Run:
    parts = vector(source)
    part, kind, write = size // len(parts), RAW[size // 8], writer(kernel, target)
    reads = [reader(kernel, name, f"b{part}") for name in parts]

    def run(machine, active) -> None:
        word = kind(0)
        for i, read in enumerate(reads):
            word = word | read(machine).astype(kind) << kind(i * part)
        write(machine, word, active)

    return run


@opcode(r"cvta(?:\.to)?\.(global|shared)\.u64")
def convert_address(kernel: Kernel, instruction: Instruction, found: re.Match) -> Run:
    """Generic addresses are those of their space."""
    return elementwise(kernel, instruction, ["u64"], lambda x: x)
