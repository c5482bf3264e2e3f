# SPDX-License-Identifier: BSD-3-Clause
"""How many instructions a warp executes before, in and after the main loop: the innermost loops with matrix products.

PYTHONPATH=tests python -m ptx.counts     prints a table; needs nvcc, compiles for a minute when run for the first time
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from cuda_emulator import harness
from inputs import draw

from .parser import Kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Executed(NamedTuple):
    """Per warp, the mean over all warps of a launch."""

    prologue: float  # all that may be followed by the main loop, so also what plans a panel of keys
    loop: float
    epilogue: float

    @property
    def around(self) -> float:
        """The share outside of the loop."""
        return 1 - self.loop / sum(self)


def successors(kernel: Kernel) -> list[list[int]]:
    """Of every instruction; the end of the kernel is none."""
    instructions, result = kernel.instructions, []
    for i, instruction in enumerate(instructions):
        name = instruction.opcode.split(".")[0]
        falls = name not in ("bra", "ret", "exit") or instruction.guard
        after = [i + 1] if falls and i + 1 < len(instructions) else []
        if name == "bra":
            after.append(kernel.labels[instruction.operands[0]])
        result.append(after)
    return result


def reverse(edges: list[list[int]]) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in edges]
    for i, targets in enumerate(edges):
        for target in targets:
            result[target].append(i)
    return result


def reached(edges: list[list[int]], starts: list[int], without: int = -1) -> np.ndarray:
    """Whether an instruction can be reached from any of the starts, not by way of `without`."""
    seen, left = np.zeros(len(edges), bool), list(starts)
    while left:
        at = left.pop()
        if not seen[at]:
            seen[at] = True
            if at != without:
                left.extend(edges[at])
    return seen


def back_edges(edges: list[list[int]]) -> list[tuple[int, int]]:
    """Edges to an instruction that the way to their start has come by."""
    found, state = [], np.zeros(len(edges), np.int8)  # 1: on the way, 2: left
    left = [(0, iter(edges[0]))]
    state[0] = 1
    while left:
        at, rest = left[-1]
        following = next(rest, None)
        if following is None:
            state[at] = 2
            left.pop()
        elif state[following] == 1:
            found.append((at, following))
        elif state[following] == 0:
            state[following] = 1
            left.append((following, iter(edges[following])))
    return found


def main_loop(kernel: Kernel) -> np.ndarray:
    """Which instructions belong to it."""
    edges = successors(kernel)
    backwards = reverse(edges)
    product = np.array([i.opcode.startswith("mma.") for i in kernel.instructions])
    bodies: dict[int, np.ndarray] = {}  # by their first instruction
    for end, head in back_edges(edges):
        body = reached(backwards, [end], without=head)
        bodies[head] = bodies.get(head, False) | body
    loops = [body for body in bodies.values() if (body & product).any()]
    innermost = [a for a in loops if not any((b & ~a).sum() == 0 and (a & ~b).any() for b in loops)]
    return np.logical_or.reduce(innermost) if innermost else np.zeros(len(edges), bool)


def executed(kernel: Kernel, issued: np.ndarray, warps: int) -> Executed:
    """`issued`: by all warps of a launch, for each instruction."""
    loop = main_loop(kernel)
    before = reached(reverse(successors(kernel)), list(np.flatnonzero(loop))) & ~loop
    parts = (before, loop, ~before & ~loop)
    return Executed(*(float(issued[part].sum() / warps) for part in parts))


def of_call(library, dtype: str, head_dim: int, keys: int) -> dict[str, Executed]:
    """By kernel, of the forward and the backward of a call: 12 batch rows that share a bias, as many queries as keys, a
    gate, nothing masked. Kernels without a main loop are left out."""
    bias = (1, 1, keys, keys)
    sizes = {"batch": (12,), "heads": 1, "q": keys, "k": keys, "d": head_dim, "bias": bias, "mask": None}
    inputs = draw(seed=1, dtype=DTYPES[dtype], lse=False, **sizes)
    saved = harness.forward(library, *inputs.tensors)
    launched = list(library.launched)
    harness.backward(library, saved, inputs.grad_out, None, *inputs.tensors)
    names = {mangled: kernel.variant for kernel, mangled in library.variants(90).items()}
    counts = {names[x.kernel.name]: executed(x.kernel, x.issued, x.warps) for x in [*launched, *library.launched]}
    return {name: parts for name, parts in counts.items() if parts.loop}


def main() -> None:
    from . import build, library

    dims, keys = (16, 32), 256
    interpreter = library.Library(*build.build((*(f"_bf16_{d}.cu" for d in dims), "bias_workspace.cu")))
    print(f"instructions of PTX that a warp executes at Q = K = {keys}, bf16, sm_90\n")
    print("| kernel | head_dim | before the loop | in the loop | after the loop | share around the loop |")
    print("|---|---|---|---|---|---|")
    for head_dim in dims:
        for name, parts in of_call(interpreter, "bf16", head_dim, keys).items():
            figures = " | ".join(f"{x:.0f}" for x in parts)
            print(f"| {name} | {head_dim} | {figures} | {100 * parts.around:.0f} % |")


if __name__ == "__main__":
    main()
