#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Is every kernel right on this card? A table in the first minute: rows are ways to reach a kernel, columns what it
promises.

A cell is one call or a few, forward and backward, in each dtype of its row, judged by the rule of tests/tolerance.py:
"." is right, "X" wrong, "-" does not apply. What was wrong stands below, with the kernel's reason; a line for every cell
goes to RESULTS/table.jsonl as soon as it is known. Exit status 1 if a cell is wrong. A device in error starts the script
anew behind the cell.

    python benchmarks/gpu_table.py RESULTS [--device cpu]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cuda_emulator import low
from inputs import DIFFERENTIABLE, Inputs, assert_identical, draw, evaluate
from tolerance import Judge

from torch_gated_attn import explain, gated_attention_with_lse

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Q, K, HEADS, ROWS = 72, 76, 2, 3  # a tile and a piece of one, for every kernel
MANY_KEYS = (("k", 1028), ("q", 33), ("heads", 1))  # more than a strip of dBias holds on any card


@dataclasses.dataclass(frozen=True)
class Way:
    """What makes a call reach certain kernels; `changes` are arguments of tests/inputs.py's draw()."""

    name: str
    bias: str | None = "shared"  # by batch rows; "own": one for each; "keys": also shared by queries and heads
    dtypes: tuple[torch.dtype, ...] = (BF16, FP16)
    bias_dtype: torch.dtype | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    def draw(self, dtype: torch.dtype, device: str, **changes: Any) -> Inputs:
        sizes = {"batch": (ROWS,), "heads": HEADS, "q": Q, "k": K, "d": 32, "seed": 1, **dict(self.changes), **changes}
        rows, h, q, k = sizes["batch"][0], sizes["heads"], sizes["q"], sizes["k"]
        bias = {"shared": (1, h, q, k), "own": (rows, h, q, k), "keys": (1, 1, 1, k), None: None}[self.bias]
        return draw(dtype=dtype, device=device, **{"bias": bias, "bias_dtype": self.bias_dtype, **sizes})


WAYS = [
    Way("no bias", bias=None),
    Way("shared bias"),
    Way("shared float32 bias", bias_dtype=FP32),
    Way("own bias", bias="own"),
    Way("own float32 bias", bias="own", bias_dtype=FP32),
    Way("shared, many keys", changes=MANY_KEYS),
    Way("float32, many keys", bias_dtype=FP32, changes=MANY_KEYS),
    Way("odd number of keys", changes=(("k", K + 1),)),
    Way("odd, float32 bias", bias_dtype=FP32, changes=(("k", K + 1),)),
    Way("bias of keys", bias="keys"),
    Way("large scale", changes=(("scale", 1.5),)),
    Way("head_dim 12", changes=(("d", 12),)),
    Way("float32", dtypes=(FP32,)),
    Way("float32, own bias", bias="own", dtypes=(FP32,)),
    Way("float32, no bias", bias=None, dtypes=(FP32,)),
    Way("float32, many keys", dtypes=(FP32,), changes=MANY_KEYS),
    Way("float32, large scale", dtypes=(FP32,), changes=(("scale", 1.5),)),
    Way("float64", dtypes=(FP64,)),
]


class NotApplicable(Exception):
    """The promise says nothing about calls of this kind."""


def judged(inputs: Inputs) -> list[str]:
    judge = Judge()
    judge.compare("", inputs)
    return judge.failures


def drawn(**changes: Any) -> Callable[[Way, torch.dtype, str], list[str]]:
    """The promise that calls with these arguments are accurate."""

    def promise(way: Way, dtype: torch.dtype, device: str) -> list[str]:
        if any(name in dict(way.changes) for name in changes):  # it would be another way
            raise NotApplicable
        return judged(way.draw(dtype, device, **changes))

    return promise


def low_rows(way: Way, dtype: torch.dtype, device: str) -> list[str]:
    """Rows that the bias pushes down as a whole."""
    if way.bias not in ("shared", "own"):
        raise NotApplicable
    judge = Judge()
    inputs = way.draw(dtype, device)
    for value in (-1e9, -3e4):
        if value > torch.finfo(inputs.bias.dtype).min:
            low.compare(judge, f"{value:g}", low.make(inputs, slice(3, 9), None, value))
    return judge.failures


def dead_rows(way: Way, dtype: torch.dtype, device: str) -> list[str]:
    """Rows that attend to nothing: by the mask, and by a bias of -inf."""
    failures = []
    for policy in ("zero", "mean"):
        inputs = way.draw(dtype, device, masked_rows=policy)
        inputs.mask[1] = False
        if way.bias in ("shared", "own"):
            inputs.bias[..., 5, :] = -math.inf
        failures += judged(inputs)
    return failures


def positions(way: Way, dtype: torch.dtype, device: str) -> list[str]:
    """Causal order, a window, key lengths, and a mask that differs between queries."""
    failures = []
    keys = dict(way.changes).get("k", K)
    for changes in (
        {"is_causal": True},
        {"is_causal": True, "window": 33, "key_lengths": [keys, keys // 2, 33]},
        {"key_lengths": [0, keys, keys - 12], "masked_rows": "mean", "mask": None},
    ):
        failures += judged(way.draw(dtype, device, **changes))
    return failures


def no_trace(way: Way, dtype: torch.dtype, device: str) -> list[str]:
    """NaN and infinity in masked keys and values change no bit."""
    clean = way.draw(dtype, device)
    masked = ~clean.mask.mT
    poisoned = clean.replace(key=clean.key.masked_fill(masked, math.nan), value=clean.value.masked_fill(masked, math.inf))
    return same_bits(clean, [poisoned])


def repeated(way: Way, dtype: torch.dtype, device: str) -> list[str]:
    inputs = way.draw(dtype, device, q=200, batch=(7,))
    return same_bits(inputs, [inputs] * 5)


def same_bits(first: Inputs, others: list[Inputs]) -> list[str]:
    expected = evaluate(gated_attention_with_lse, first)
    try:
        for inputs in others:
            assert_identical(expected, evaluate(gated_attention_with_lse, inputs), "two calls")
    except AssertionError as error:
        return [str(error)]
    return []


HEAD_DIMS = (8, 16, 32, 48, 64, 96, 128)
PROMISES: dict[str, Callable[[Way, torch.dtype, str], list[str]]] = {
    **{f"D={d}": drawn(d=d) for d in HEAD_DIMS},
    "Dv": drawn(d=16, dv=8),
    "sizes": drawn(q=130, k=97),
    "groups": drawn(heads=4, kv_heads=2, mask=None),
    "no gate": drawn(gate=None),
    "a gate a head": drawn(gate="head"),
    "scale": drawn(scale=-0.3),
    "pairs": drawn(mask="full"),
    "positions": positions,
    "low": low_rows,
    "dead": dead_rows,
    "no trace": no_trace,
    "bits": repeated,
}


@dataclasses.dataclass
class Cell:
    way: str
    promise: str
    right: bool | None  # None: does not apply
    wrong: list[str]
    kernel: str = ""
    seconds: float = 0

    @property
    def mark(self) -> str:
        return {True: ".", False: "X", None: "-"}[self.right]


def reason(way: Way, dtype: torch.dtype, device: str) -> str:
    """Of the choice of kernels for a call of this kind, with gradients."""
    inputs = way.draw(dtype, device)
    given = [name for name in DIFFERENTIABLE if getattr(inputs, name) is not None]
    found = explain(*inputs.tensors, scale=inputs.scale, grad=given)
    return f"{found.kernel}: {found.reason}"


def run_cell(way: Way, promise: str, device: str) -> Cell:
    start, wrong, applies = time.perf_counter(), [], False
    for dtype in way.dtypes:
        name = str(dtype).removeprefix("torch.")
        try:
            wrong += [f"{name}: {text.strip()}" for text in PROMISES[promise](way, dtype, device)]
            applies = True
        except NotApplicable:
            continue
        except Exception as error:  # whatever it is, the next cell is to be tried
            wrong.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    right = not wrong if applies or wrong else None
    return Cell(way.name, promise, right, wrong, seconds=time.perf_counter() - start)


def device_in_error(cell: Cell) -> bool:
    """After an illegal access nothing runs in this process any more."""
    return any("CUDA error" in text or "AcceleratorError" in text for text in cell.wrong)


def cells(device: str, first: int = 0) -> Iterator[Cell]:
    for way, promise in list(itertools.product(WAYS, PROMISES))[first:]:
        cell = run_cell(way, promise, device)
        if cell.right is False and not device_in_error(cell):
            cell.kernel = reason(way, way.dtypes[0], device)
        yield cell


def print_row(row: list[Cell]) -> None:
    print(f"{row[0].way:{max(len(way.name) for way in WAYS)}} " + " ".join(cell.mark for cell in row), flush=True)


def print_wrong(done: list[Cell], seconds: float) -> None:
    wrong = [cell for cell in done if cell.right is False]
    for cell in wrong:
        print(f"X {cell.way} / {cell.promise}: {'; '.join(cell.wrong[:3])[:300]}\n    {cell.kernel}")
    right = sum(cell.right is True for cell in done)
    print(
        f"{right} of {right + len(wrong)} cells right, {len(WAYS) * len(PROMISES) - len(done)} not tried, {seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for table.jsonl")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--first", type=int, default=0, help="the cell to begin with; table.jsonl has those before")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / "table.jsonl"
    warnings.simplefilter("ignore")
    if arguments.first == 0:
        file.unlink(missing_ok=True)
        print("columns: " + ", ".join(PROMISES), flush=True)
        done = []
    else:
        done = [Cell(**json.loads(line)) for line in file.read_text().splitlines()]
    with file.open("a") as lines:
        for cell in cells(arguments.device, arguments.first):
            done.append(cell)
            lines.write(json.dumps(dataclasses.asdict(cell)) + "\n")
            lines.flush()
            if len(done) % len(PROMISES) == 0:
                print_row(done[-len(PROMISES) :])
            if device_in_error(cell):
                anew = [str(arguments.results), "--device", arguments.device, "--first", str(len(done))]
                os.execv(sys.executable, [sys.executable, __file__, *anew])
    print_wrong(done, sum(cell.seconds for cell in done))
    return int(any(cell.right is False for cell in done))


if __name__ == "__main__":
    sys.exit(main())
