# SPDX-License-Identifier: BSD-3-Clause
"""Runs a kernel's PTX on numpy arrays that hold a register of every thread of some blocks.

Threads go in lock step, those at the lowest program counter first, so that what diverged meets again where the code does.
Barriers release all blocks that run together at once: blocks know nothing of each other, and one more wait harms none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import arithmetic, movement, warps  # noqa: F401  # they fill the table of handlers
from .faults import Fault, Finding
from .memory import GlobalMemory
from .operands import Read, Run, compile_instruction, reader, slot, writer
from .parser import Instruction, Kernel, Unsupported, parse_instruction
from .shared import SharedMemory

DONE, WAITS = 1 << 40, 1 << 39  # program counters of threads that do not go on
MOST_THREADS = 4096  # at once: more is no faster, arrays then leave the cache
MOST_INSTRUCTIONS = 1_000_000  # of the threads together; the longest test takes a tenth
BARRIER = re.compile(r"bar(?:rier)?(?:\.cta)?\.(?:sync|red\.(and|or)\.pred)(?:\.aligned)?")


class Vote(NamedTuple):
    """At a barrier."""

    unanimous: bool
    read: Read
    write: Callable  # of the result


class Step(NamedTuple):
    instruction: Instruction
    guard: int  # a register; -1: none
    negated: bool
    run: Run | None  # None: the machine's own
    control: str = ""  # bra, ret, bar
    target: int = 0
    vote: Vote | None = None


def compile_step(kernel: Kernel, counter: int) -> Step:
    line, statement = kernel.statements[counter]
    instruction = parse_instruction(statement, line)
    guard = slot(kernel, instruction.guard) if instruction.guard else -1
    fields = instruction, guard, instruction.negated
    if instruction.opcode in ("bra", "bra.uni"):
        return Step(*fields, None, "bra", kernel.labels[instruction.operands[0]])
    if instruction.opcode in ("ret", "exit"):
        return Step(*fields, None, "ret")
    if found := BARRIER.fullmatch(instruction.opcode):
        operands = list(instruction.operands)
        vote = None
        if found[1]:
            vote = Vote(found[1] == "and", reader(kernel, operands.pop(), "pred"), writer(kernel, operands.pop(0)))
        if operands != ["0"]:
            raise Unsupported(f"{kernel.name}, line {instruction.line}: {instruction.text}")
        return Step(*fields, None, "bar", vote=vote)
    return Step(*fields, compile_instruction(kernel, instruction))


class Machine:
    """Some blocks of a launch."""

    def __init__(self, kernel: Kernel, parameters: bytes, blocks: range, size: int, shared: int, memory: GlobalMemory):
        self.kernel, self.memory = kernel, memory
        self.count, self.size = len(blocks) * size, size
        self.first_block = blocks.start
        memory.first_thread = blocks.start * size
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.thread = np.tile(np.arange(size, dtype=np.uint32), len(blocks))
        self.block = np.repeat(np.arange(blocks.start, blocks.stop, dtype=np.uint32), size)
        self.block_size = np.full(self.count, size, np.uint32)
        self.lane = self.thread % 32
        self.everyone = np.arange(self.count)
        self.shared = SharedMemory(len(blocks), size, shared)
        self.registers: list[np.ndarray | None] = []
        self.counters = np.zeros(self.count, np.int64)
        self.resume = np.zeros(self.count, np.int64)
        self.arrived: list[tuple[Step, np.ndarray]] = []
        self.issued = np.zeros(len(kernel.statements), np.int64)  # by warps
        self.executed = 0

    # What handlers ask for.
    def active_threads(self, active: np.ndarray | None) -> np.ndarray:
        return self.everyone if active is None else np.flatnonzero(active)

    def active_addresses(self, at: Read, active: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        threads, where = self.active_threads(active), np.broadcast_to(at(self), self.count)
        return threads, where if active is None else where[threads]

    def spread(self, values: np.ndarray, threads: np.ndarray, active: np.ndarray | None) -> np.ndarray:
        """An element for each thread, from those of the active ones."""
        if active is None:
            return np.ascontiguousarray(values)
        result = np.zeros(self.count, values.dtype)
        result[threads] = values
        return result

    def step(self, counter: int) -> Step:
        step = self.kernel.steps[counter]
        if step is None:
            step = self.kernel.steps[counter] = compile_step(self.kernel, counter)
            self.registers += [None] * (len(self.kernel.slots) - len(self.registers))
        return step

    def run(self) -> None:
        self.registers = [None] * len(self.kernel.slots)
        with np.errstate(all="ignore"):
            while True:
                lowest = int(self.counters.min())
                if lowest == DONE:
                    break
                if lowest == WAITS:
                    self.release()
                    continue
                mask = self.counters == lowest
                others = self.counters[~mask]
                stop = int(others.min()) if others.size else WAITS
                self.run_together(lowest, None if mask.all() else mask, stop)
            self.find_races(self.shared.find_races)

    def find_races(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Fault as fault:
            self.report(fault, fault.instruction)

    def run_together(self, counter: int, mask: np.ndarray | None, stop: int) -> None:
        """The threads of the mask from `counter` on, until they part, wait, end, or meet others, the nearest at `stop`."""
        warps = self.count // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum())
        start = counter
        while counter < stop:
            step = self.step(counter)
            try:
                active = self.guarded(step, mask)
                if step.run is not None:
                    if step.guard < 0 or active is None or active.any():
                        step.run(self, active)
                    counter += 1
                    continue
                self.count_issued(start, counter + 1, warps)
                start = counter = self.control(step, counter, mask, active)
            except Fault as fault:
                self.report(fault, step.instruction)
            if counter < 0:
                return
        self.count_issued(start, counter, warps)
        self.move(mask, counter)

    def guarded(self, step: Step, mask: np.ndarray | None) -> np.ndarray | None:
        if step.guard < 0:
            return mask
        value = self.registers[step.guard]
        if value is None:
            raise Fault("a predicate that was never written", 0)
        value = ~value if step.negated else value
        if mask is not None:
            return mask & value
        return None if value.all() else value

    def control(self, step: Step, counter: int, mask: np.ndarray | None, active: np.ndarray | None) -> int:
        """Where the threads go on together; -1: they do not."""
        if step.control == "bra":
            taken = active is None or bool(active.any())
            if not taken or step.guard < 0 or active is None or (mask is not None and bool((active == mask).all())):
                return step.target if taken else counter + 1
        self.move(mask, counter + 1)
        if step.control == "bra":
            self.counters[active] = step.target
        elif step.control == "ret":
            self.move(active, DONE)
        else:
            if step.guard >= 0:
                raise Unsupported("a barrier under a predicate")
            warps.whole_warps(self, mask)
            self.arrive(step, mask, counter + 1)
        return -1

    def move(self, mask: np.ndarray | None, counter: int) -> None:
        self.counters[slice(None) if mask is None else mask] = counter

    def arrive(self, step: Step, mask: np.ndarray | None, resume: int) -> None:
        which = np.ones(self.count, bool) if mask is None else mask
        self.resume[which], self.counters[which] = resume, WAITS
        self.arrived.append((step, which))

    def release(self) -> None:
        """Everyone waits or is done."""
        arrived, self.arrived = self.arrived, []
        self.find_races(self.shared.sync_block)
        self.count_votes([(step.vote, which) for step, which in arrived if step.vote])
        waits = self.counters == WAITS
        kind = np.zeros(self.count, np.int8)
        for step, which in arrived:
            kind[which] = 0 if step.vote is None else 1 + step.vote.unanimous
        kinds = np.ma.masked_array(kind, ~waits).reshape(-1, self.size)
        if (kinds.min(1) != kinds.max(1)).any():
            self.report(Fault("threads of a block wait at barriers of different kinds", 0), arrived[0][0].instruction)
        self.counters[waits] = self.resume[waits]

    def count_votes(self, arrived: list[tuple[Vote, np.ndarray]]) -> None:
        """The threads of a block may stand at barriers in different places of the code."""
        given = {True: np.ones(self.count, bool), False: np.zeros(self.count, bool)}
        for vote, which in arrived:
            given[vote.unanimous] = np.where(which, vote.read(self), given[vote.unanimous])
        for vote, which in arrived:
            blocks = given[vote.unanimous].reshape(-1, self.size)
            result = blocks.all(1) if vote.unanimous else blocks.any(1)
            vote.write(self, np.repeat(result, self.size), which)

    def count_issued(self, start: int, end: int, warps: int) -> None:
        self.issued[start:end] += warps
        self.executed += end - start
        if self.executed > MOST_INSTRUCTIONS:
            raise Finding(f"{self.kernel.name} does not end")

    def report(self, fault: Fault, instruction: Instruction) -> None:
        block, thread = divmod(fault.thread, self.size)
        raise Finding(
            f"{self.kernel.name}, line {instruction.line} of its PTX, `{instruction.text}`: "
            f"thread {thread} of block {self.first_block + block}: {fault.what}"
        ) from fault
