# SPDX-License-Identifier: BSD-3-Clause
"""Global memory: the ranges of this process that a kernel may touch, each two bytes of which know who wrote them."""

from __future__ import annotations

import ctypes

import numpy as np

from .faults import Fault

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WARP = 32
NEVER, EARLIER = -2, -1  # states of two bytes; others: the thread that wrote them in this launch


class Range:
    def __init__(self, start: int, size: int, writable: bool) -> None:
        self.start, self.end, self.writable = start, start + size, writable
        # Views of every width begin where the widest access may: whoever is within the range reads within it.
        self.base = start & ~15
        whole = (self.end - self.base + 15) & ~15
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * whole).from_address(self.base))
        self.views = {width: self.bytes.view(kind) for width, kind in RAW.items()}
        self.state = np.full(whole // 2 if writable else 0, NEVER, np.int32)

    def holds(self, at: np.ndarray, size: int) -> bool:
        return bool(((at >= self.start) & (at <= self.end - size)).all())


class GlobalMemory:
    """Addresses are int64 arrays of active threads, `threads` their numbers among those that run together."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self.first_thread = 0  # in the launch, of those that run together

    def allow(self, start: int, size: int, writable: bool) -> None:
        if size:
            self.ranges.append(Range(start, size, writable))

    def next_launch(self) -> None:
        for each in self.ranges:
            each.state[each.state >= 0] = EARLIER

    def find(self, at: np.ndarray, size: int, threads: np.ndarray, write: bool) -> list[tuple[Range, np.ndarray | slice]]:
        """The ranges that the addresses lie in, with which of them."""
        self.check_aligned(at, size, threads)
        for each in self.ranges:
            if each.holds(at, size) and (each.writable or not write):
                return [(each, slice(None))]
        left, parts = np.ones(len(at), bool), []
        for each in self.ranges:
            inside = left & (at >= each.start) & (at <= each.end - size)
            if (each.writable or not write) and inside.any():
                parts.append((each, np.flatnonzero(inside)))
                left &= ~inside
        if left.any():
            thread = np.flatnonzero(left)[0]
            raise Fault(
                f"a {'write' if write else 'read'} out of bounds of {size} bytes at {at[thread]:#x}", threads[thread]
            )
        return parts

    def check_aligned(self, at: np.ndarray, size: int, threads: np.ndarray) -> None:
        if (misaligned := at % size != 0).any():
            thread = np.flatnonzero(misaligned)[0]
            raise Fault(f"a misaligned access of {size} bytes at {at[thread]:#x}", threads[thread])

    def load(self, at: np.ndarray, width: int, count: int, threads: np.ndarray) -> np.ndarray:
        """[threads, count] elements of `width` bytes."""
        result = np.empty((len(at), count), RAW[width])
        for each, which in self.find(at, width * count, threads, False):
            offset = at[which] - each.base
            if each.writable:
                self.check_read(each, offset, width * count, threads[which])
            result[which] = each.views[width][(offset // width)[:, None] + np.arange(count)]
        return result

    def store(self, at: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """values: [threads, count]."""
        width, count = values.dtype.itemsize, values.shape[1]
        if width < 2:
            raise NotImplementedError("a store of one byte")
        for each, which in self.find(at, width * count, threads, True):
            offset = at[which] - each.base
            self.mark_written(each, offset, width * count, threads[which])
            each.views[width][(offset // width)[:, None] + np.arange(count)] = values[which]

    def check_read(self, each: Range, offset: np.ndarray, size: int, threads: np.ndarray) -> None:
        state = each.state[(offset // 2)[:, None] + np.arange(size // 2)]
        if (state == EARLIER).all():
            return
        own = threads[:, None] + self.first_thread
        never, foreign = (state == NEVER).any(1), ((state >= 0) & (state != own)).any(1)
        for bad, what in ((never, "that were never written"), (foreign, "that another thread wrote in this launch")):
            if bad.any():
                first = np.flatnonzero(bad)[0]
                raise Fault(f"a read of {size} bytes at {each.base + offset[first]:#x} {what}", threads[first])

    def mark_written(self, each: Range, offset: np.ndarray, size: int, threads: np.ndarray) -> None:
        where = (offset // 2)[:, None] + np.arange(size // 2)
        before, own = each.state[where], threads[:, None] + self.first_thread
        each.state[where] = own
        # Threads of one warp may write in turn, ordered by its barriers, which are not followed here: zeros, then means.
        foreign = ((before >= 0) & (before // WARP != own // WARP)) | (each.state[where] != own)
        if foreign.any():
            first = np.flatnonzero(foreign.any(1))[0]
            raise Fault(
                f"a write of {size} bytes at {each.base + offset[first]:#x} that another thread writes too", threads[first]
            )
