# SPDX-License-Identifier: BSD-3-Clause
"""PTX text as kernels: instructions with their operands, labels, register widths."""

from __future__ import annotations

import dataclasses
import functools
import re

STATEMENT = re.compile(
    r"""\s+ | //[^\n]* | [{}]                # scopes; the braces of operands are inside a statement
    | (?P<label>[$\w]+):
    | (?P<statement>[^;]+);""",
    re.VERBOSE,
)
REGISTERS = re.compile(r"\.reg \.(pred|b\d+|f\d+|s\d+|u\d+)\s+(.*)", re.DOTALL)
GUARD = re.compile(r"@(!?)(%?\w+)\s+")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
IGNORED = (".pragma", ".loc")


class Unsupported(NotImplementedError):
    """The interpreter does not know what it read, and does not guess."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    line: int  # of the file
    text: str
    opcode: str  # with its modifiers
    operands: tuple[str, ...]
    guard: str  # a predicate register, empty for none
    negated: bool


class Kernel:
    """One entry of a file. Parsed when it is first needed, since most kernels of a file never run in a test."""

    def __init__(self, name: str, parameters: str, body: str, line: int, dynamic_shared: str) -> None:
        self.name, self.body, self.line = name, body, line
        found = re.findall(r"\.b8 (\w+)\[(\d+)\]", parameters)
        if len(found) != 1:
            raise Unsupported(f"{name}: kernels take one struct, not ({parameters.strip()})")
        self.parameter, self.parameter_bytes = found[0][0], int(found[0][1])
        self.dynamic_shared = dynamic_shared  # its symbol
        self.labels: dict[str, int] = {}
        self.slots: dict[str, int] = {}  # of the machine, by register
        self.widths: dict[str, int] = {}  # bytes of a register by its name without the number; 0: a predicate

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        result: list[Instruction] = []
        position, line = 0, self.line
        while position < len(self.body):
            found = STATEMENT.match(self.body, position)
            if found is None:
                raise Unsupported(f"{self.name}, line {line}: {self.body[position : position + 80]!r}")
            if label := found["label"]:
                self.labels[label] = len(result)
            elif statement := found["statement"]:
                if statement.startswith("."):
                    self.declare(statement)
                else:
                    result.append(instruction(statement, line))
            line += self.body.count("\n", position, found.end())
            position = found.end()
        return result

    @functools.cached_property
    def steps(self) -> list:
        """What the machine makes of the instructions, each when it first gets there."""
        return [None] * len(self.instructions)

    def declare(self, statement: str) -> None:
        if found := REGISTERS.fullmatch(statement):
            kind, names = found.groups()
            for name in names.split(","):
                base = re.sub(r"<\d+>$", "", name.strip())
                self.widths[base] = 0 if kind == "pred" else int(kind[1:]) // 8
        elif not statement.startswith(IGNORED):
            raise Unsupported(f"{self.name}: {statement}")

    def width(self, register: str) -> int:
        """Bytes; 0 for a predicate."""
        for name in (register, register.rstrip("0123456789")):
            if name in self.widths:
                return self.widths[name]
        raise Unsupported(f"{self.name}: {register} is no register")


def instruction(statement: str, line: int) -> Instruction:
    text = " ".join(statement.split())
    guard = GUARD.match(text)
    opcode, _, operands = text[guard.end() if guard else 0 :].partition(" ")
    name, negated = (guard[2], guard[1] == "!") if guard else ("", False)
    return Instruction(line, text, opcode, tuple(OPERAND.findall(operands)), name, negated)


def parse(text: str) -> dict[str, Kernel]:
    """The entries of a file by their mangled names."""
    kernels, line, position = {}, 1, 0
    shared = re.findall(r"^\.extern \.shared .* (\w+)\[\];", text, re.MULTILINE)
    if len(shared) > 1:
        raise Unsupported(f"shared memory {shared}")
    for found in re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)[^{]*\{", text):
        begin = found.end()
        end = text.index("\n}", begin)  # scopes within a kernel are indented
        line += text.count("\n", position, begin)
        kernels[found[1]], position = Kernel(found[1], found[2], text[begin:end], line, *(shared or [""])), begin
    return kernels
