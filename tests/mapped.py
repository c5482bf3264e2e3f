# SPDX-License-Identifier: BSD-3-Clause
"""Tensors in memory of the test's own: beside protected pages, or spread over more addresses than there is memory."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which the module mmap does not name: pages exist once they are written
PROT_NONE = 0


def _map(size: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _protect(address: int, size: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(x: Tensor, side: str) -> Tensor:
    """A contiguous copy of `x` that starts right after a protected page ("before") or ends right before one ("after")."""
    page = mmap.PAGESIZE
    size = x.numel() * x.element_size()
    room = -(-max(size, 1) // page) * page
    memory, address = _map(room + 2 * page)
    _protect(address, page)
    _protect(address + page + room, page)
    offset = page if side == "before" else page + room - size
    if x.numel() == 0:
        return x.clone()
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


def spread(x: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy of `x` with these strides, which may reach further than the machine has memory: only touched pages exist."""
    last = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    memory, _ = _map((last + 1) * x.element_size())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def exit_code_of(function: Callable[[], None]) -> int:
    """Runs `function` in a forked process: 0, 1 after an exception, or minus the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()  # a signal is the answer, not an accident
            torch.set_num_threads(1)  # GNU OpenMP cannot start threads after a fork
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
