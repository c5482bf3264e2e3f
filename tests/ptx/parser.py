# SPDX-License-Identifier: BSD-3-Clause
"""PTX text as kernels: instructions with their operands, labels, register widths."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

STATEMENT = re.compile(
    r"""\s*(?: //[^\n]* | (?P<brace>[{}])      # scopes; the braces of operands are inside a statement
    | (?P<label>[$\w]+):
    | (?P<statement>[^;\s][^;]*); | \Z)""",
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


@dataclasses.dataclass(eq=False)
class Kernel:
    """One entry of a file. Parsed when it is first needed, since most kernels of a file never run in a test."""

    name: str
    parameters: str
    body: str
    line: int
    dynamic_shared: str  # its symbol

    def __post_init__(self) -> None:
        found = re.findall(r"\.b8 (\w+)\[(\d+)\]", self.parameters)
        if len(found) != 1:
            raise Unsupported(f"{self.name}: kernels take one struct, not ({self.parameters.strip()})")
        self.parameter, self.parameter_bytes = found[0][0], int(found[0][1])
        self.labels: dict[str, int] = {}
        self.slots: dict[str, int] = {}  # of the machine, by register
        self.readers: dict[tuple[str, str], Callable] = {}  # what reads an operand as a type
        self.widths: dict[str, int] = {}  # bytes of a register by its name without the number; 0: a predicate

    @functools.cached_property
    def statements(self) -> list[tuple[int, str]]:
        """Instructions as they stand there, with their lines; registers of inner scopes have names of their own."""
        result: list[tuple[int, str]] = []
        scopes: list[dict[str, str]] = []
        position, line = 0, self.line
        for found in STATEMENT.finditer(self.body):
            if found.start() != position:
                break
            if label := found["label"]:
                self.labels[label] = len(result)
            elif brace := found["brace"]:
                scopes = [*scopes, {}] if brace == "{" else scopes[:-1]
            elif statement := found["statement"]:
                if statement.startswith("."):
                    self.declare(statement, scopes)
                else:
                    leading = self.body.count("\n", position, found.start("statement"))
                    result.append((line + leading, renamed(statement, scopes)))
            line += found[0].count("\n")
            position = found.end()
        if position != len(self.body):
            raise Unsupported(f"{self.name}, line {line}: {self.body[position : position + 80]!r}")
        return result

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        return [parse_instruction(statement, line) for line, statement in self.statements]

    @functools.cached_property
    def steps(self) -> list:
        """What the machine makes of the instructions, each when it first gets there."""
        return [None] * len(self.statements)

    def declare(self, statement: str, scopes: list[dict[str, str]]) -> None:
        if found := REGISTERS.fullmatch(statement):
            kind, names = found.groups()
            for name in names.split(","):
                base = re.sub(r"<\d+>$", "", name.strip())
                if scopes:
                    scopes[-1][base] = base = f"{base}_{len(self.widths)}"
                self.widths[base] = 0 if kind == "pred" else int(kind[1:]) // 8
        elif not statement.startswith(IGNORED):
            raise Unsupported(f"{self.name}: {statement}")

    def width(self, register: str) -> int:
        """Bytes; 0 for a predicate."""
        for name in (register, register.rstrip("0123456789")):
            if name in self.widths:
                return self.widths[name]
        raise Unsupported(f"{self.name}: {register} is no register")


def renamed(statement: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        statement = re.sub(r"%?\w+", lambda found, scope=scope: scope.get(found[0], found[0]), statement)
    return statement


def parse_instruction(statement: str, line: int) -> Instruction:
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
