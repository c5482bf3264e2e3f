# SPDX-License-Identifier: BSD-3-Clause
"""What ends a run: a thread did something that a GPU would not forgive."""

from __future__ import annotations

from .parser import Instruction


class Fault(Exception):
    """Raised where it is noticed, which knows the thread of those that run together; the machine adds the rest."""

    def __init__(self, what: str, thread: int, instruction: Instruction | None = None) -> None:
        super().__init__(what)
        self.what, self.thread, self.instruction = what, int(thread), instruction


class Finding(AssertionError):
    """A fault with its place."""
