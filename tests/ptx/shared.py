# SPDX-License-Identifier: BSD-3-Clause
"""Shared memory of the blocks that run together: poisoned, each word knowing whether it was written, and a record of all
accesses since the last barrier, in which races are looked for at the next."""

from __future__ import annotations

import dataclasses

import numpy as np

from .faults import Fault
from .parser import Instruction

BASE = 0x1000  # as in the emulator: a null or forgotten base is out of bounds
POISON = 0xFFFFFFFF


@dataclasses.dataclass
class Access:
    """Of one instruction: `count` words from `word` on, for each of `threads`."""

    word: np.ndarray
    count: int
    threads: np.ndarray
    clock: np.ndarray  # the thread's number of warp barriers so far
    write: bool
    instruction: Instruction

    def words(self) -> np.ndarray:
        return self.word[:, None] + np.arange(self.count)


@dataclasses.dataclass
class Copy:
    """A cp.async on its way."""

    word: np.ndarray
    data: np.ndarray  # [threads, 4]
    threads: np.ndarray
    group: np.ndarray
    instruction: Instruction


class SharedMemory:
    def __init__(self, blocks: int, threads: int, size: int) -> None:
        self.block_threads, self.size = threads, size
        self.block_words = -(-size // 16) * 4
        total = blocks * self.block_words
        self.data = np.full(total, POISON, np.uint32)
        self.written = np.zeros(total, bool)
        self.clock = np.zeros(blocks * threads, np.int32)
        self.group = np.zeros(blocks * threads, np.int32)  # copies committed so far
        self.accesses: list[Access] = []
        self.copies: list[Copy] = []
        self.writer = np.full(total, -1, np.int32)  # within find_races() only

    def words(self, at: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """The words that addresses begin at."""
        if (bad := at % size != 0).any():
            thread = np.flatnonzero(bad)[0]
            raise Fault(f"a misaligned shared access of {size} bytes at {at[thread]:#x}", threads[thread])
        if (bad := (at < BASE) | (at > BASE + self.size - size)).any():
            thread = np.flatnonzero(bad)[0]
            raise Fault(f"a shared access out of bounds of {size} bytes at {at[thread]:#x}", threads[thread])
        return threads // self.block_threads * self.block_words + (at - BASE) // 4

    def record(self, word: np.ndarray, count: int, threads: np.ndarray, write: bool, instruction: Instruction) -> None:
        self.accesses.append(Access(word, count, threads, self.clock[threads], write, instruction))

    def load(self, at: np.ndarray, count: int, threads: np.ndarray, instruction: Instruction) -> np.ndarray:
        """[threads, count] words."""
        word = self.words(at, 4 * count, threads)
        where = word[:, None] + np.arange(count)
        if not (written := self.written[where]).all():
            thread = np.flatnonzero(~written.all(1))[0]
            raise Fault(
                f"a read of shared memory at {at[thread]:#x} that was never written or waits for a copy", threads[thread]
            )
        self.record(word, count, threads, False, instruction)
        return self.data[where]

    def store(self, at: np.ndarray, values: np.ndarray, threads: np.ndarray, instruction: Instruction) -> None:
        word = self.words(at, 4 * values.shape[1], threads)
        self.record(word, values.shape[1], threads, True, instruction)
        where = word[:, None] + np.arange(values.shape[1])
        self.data[where], self.written[where] = values, True

    def begin_copy(self, at: np.ndarray, data: np.ndarray, threads: np.ndarray, instruction: Instruction) -> None:
        """What the copy will overwrite is lost from now on, what it brings is there after the wait."""
        word = self.words(at, 16, threads)
        self.record(word, 4, threads, True, instruction)
        where = word[:, None] + np.arange(4)
        self.data[where], self.written[where] = POISON, False
        self.copies.append(Copy(word, data, threads, self.group[threads], instruction))

    def commit(self, threads: np.ndarray) -> None:
        self.group[threads] += 1

    def wait(self, pending: int, threads: np.ndarray) -> None:
        """Until no more than the last `pending` groups of a thread are on their way."""
        waits = np.zeros(len(self.group), bool)
        waits[threads] = True
        left = []
        for copy in self.copies:
            due = waits[copy.threads] & (copy.group < self.group[copy.threads] - pending)
            if due.any():
                word, data = copy.word[due], copy.data[due]
                where = word[:, None] + np.arange(4)
                self.data[where], self.written[where] = data, True
                self.record(word, 4, copy.threads[due], True, copy.instruction)
            if not due.all():
                kept = ~due
                left.append(Copy(copy.word[kept], copy.data[kept], copy.threads[kept], copy.group[kept], copy.instruction))
        self.copies = left

    def sync_warps(self, threads: np.ndarray) -> None:
        self.clock[threads] += 1

    def sync_block(self) -> None:
        self.find_races()
        for copy in self.copies:  # may arrive at any time
            self.record(copy.word, 4, copy.threads, True, copy.instruction)

    def find_races(self) -> None:
        """Two threads touched a word, one of them wrote it, and neither a barrier of the block nor, where they are of one
        warp, one of the warp lay between."""
        accesses, self.accesses = self.accesses, []
        writes = [a.words() for a in accesses if a.write]
        if not writes:
            return
        for access, words in zip((a for a in accesses if a.write), writes, strict=True):
            self.writer[words] = access.threads[:, None]
        shared = np.zeros(len(self.writer), bool)  # words that a thread besides the last writer touched
        for access in accesses:
            words = access.words()
            writer = self.writer[words]
            shared[words[(writer >= 0) & (writer != access.threads[:, None])]] = True
        for words in writes:
            self.writer[words] = -1
        if shared.any():
            self.judge([a for a in accesses if shared[a.words()].any()], shared)

    def judge(self, accesses: list[Access], shared: np.ndarray) -> None:
        columns = []
        for i, access in enumerate(accesses):
            words = access.words()
            row, column = np.nonzero(shared[words])
            kind = np.full(len(row), access.write)
            columns.append((words[row, column], access.threads[row], access.clock[row], kind, np.full(len(row), i)))
        word, thread, clock, write, number = (np.concatenate(c) for c in zip(*columns, strict=True))
        for same in ((word,), (word, thread // 32, clock)):
            other = thread // 32 if len(same) == 1 else thread
            order = np.lexsort((other, *same))
            new = np.zeros(len(order), bool)
            new[0] = True
            for key in same:
                new[1:] |= np.diff(key[order]) != 0
            starts = np.flatnonzero(new)
            ends = np.append(starts[1:], len(order)) - 1
            differ = other[order][starts] != other[order][ends]
            written = np.logical_or.reduceat(write[order], starts)
            if (bad := np.flatnonzero(differ & written)).size:
                group = order[starts[bad[0]] : ends[bad[0]] + 1]
                self.report(word[group[0]], thread[group], write[group], [accesses[i].instruction for i in number[group]])

    def report(self, word: int, thread: np.ndarray, write: np.ndarray, instructions: list[Instruction]) -> None:
        first = np.flatnonzero(write)[0]
        second = np.flatnonzero(thread != thread[first])[0]
        raise Fault(
            f"a race at shared word {BASE + word % self.block_words * 4:#x}: thread {thread[second] % self.block_threads} "
            f"{'writes' if write[second] else 'reads'} it too, at line {instructions[second].line}, no barrier between",
            thread[first],
            instructions[first],
        )
