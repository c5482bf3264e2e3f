#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""How fast is the operator on this card? Times by CUDA events, each shape printed and written as soon as it is known.

First what the goals speak of, triangle attention in bfloat16 with bias, mask and gate, and the core of it, without gate and
mask, beside published times of others' kernels; then other shapes of real models; FlexAttention, which has to be compiled,
and trifast, where it is installed, last. Calls shorter than a millisecond are replayed from a CUDA graph, so that launches
do not count. Backward is forward and backward less forward. RESULTS/times.jsonl has a line for each shape.

    python benchmarks/gpu_times.py RESULTS [--seconds 100] [--device cpu --shrink 16]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_gated_attn._bench import peers, peers_cuda
from torch_gated_attn._bench.machine import describe
from torch_gated_attn._bench.measure import forward, forward_backward, timed, timed_on_gpu
from torch_gated_attn._bench.workloads import DTYPES, Inputs, Workload, load, make_inputs

# Milliseconds that others published for their open kernels: forward without gate and mask, bfloat16, 4 heads of 32, as many
# batch rows as queries and keys.
PUBLISHED = {256: ("H100", 0.058), 512: ("H100", 0.310), 1024: ("H100", 2.063), 2048: ("H100", 15.16)}
PUBLISHED |= {400: ("A100", 0.366), 800: ("A100", 2.23)}
PUBLISHED_ERROR = "2.3 to 3.5"  # of the former, in spacings of bfloat16 above rounding
GOALS = {512: (0.25, 1.0), 1024: (1.8, 7.5)}  # milliseconds, forward and backward, on an H100 or H200
REPLAYED_BELOW = 1.0  # milliseconds: a launch from Python costs some 0.05
TRIANGLE = next(w for w in load(batch_key="batch") if w.name == "T1")
OTHERS = ("X1", "C1", "D1", "P1", "A1", "S1", "L1")


def triangle(length: int, **changes: Any) -> Workload:
    sizes = {"batch": [length], "q_len": length, "k_len": length, "mask_shape": [length, 1, 1, length]}
    bias = [1, TRIANGLE.heads, length, length]
    return dataclasses.replace(TRIANGLE, **{"name": f"T{length}", "bias_shape": bias, **sizes, **changes})


@dataclasses.dataclass
class Shape:
    workload: Workload
    dtype: str = "bfloat16"
    paths: tuple[str, ...] = ("operator", "eager", "sdpa")
    core: bool = False  # forward without gate and mask

    @property
    def name(self) -> str:
        return f"{self.workload.name} {self.dtype}" + " core" * self.core


def shapes() -> list[Shape]:
    named = {workload.name: workload for workload in load(batch_key="batch")}
    goals = [Shape(triangle(n)) for n in (256, 512)] + [Shape(triangle(1024), paths=("operator", "sdpa"))]
    core = [Shape(triangle(n), paths=("operator",), core=True) for n in sorted(PUBLISHED)]
    others = [Shape(triangle(511)), Shape(triangle(256), "float32"), Shape(triangle(512), "float16", ("operator",))]
    others += [Shape(named[name]) for name in OTHERS]
    compiled = [Shape(triangle(n), paths=("flex", "trifast")) for n in (256, 512)]
    return [*goals, *core, *others, *compiled]


def shrunk(workload: Workload, factor: int) -> Workload:
    """For a trial without a card: sizes divided, at least 1; the batch at most 4."""
    small = workload.cut(4)

    def divided(shape: list[int]) -> list[int]:
        return [*shape[:-2], *(max(n // factor, 1) for n in shape[-2:])]

    return dataclasses.replace(
        small,
        q_len=max(small.q_len // factor, 1),
        k_len=max(small.k_len // factor, 1),
        bias_shape=divided(small.bias_shape) if small.bias_shape else None,
        mask_shape=divided(small.mask_shape),
    )


def path(name: str) -> Callable[..., torch.Tensor] | None:
    """A path by its name; None where it is not installed."""
    if name == "flex":
        torch.compiler.reset()
        return peers_cuda.flex(peers.MASKED_LOGIT)
    if name == "trifast":
        return peers_cuda.paths(peers.sdpa, peers.MASKED_LOGIT, with_compile=False).get(name)
    return {"operator": peers.operator, "eager": peers.eager, "sdpa": peers.sdpa}[name]


def replayed(call: Callable[[], None]) -> Callable[[], None]:
    """The call's kernels, without the launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(call: Callable[[], None], on_gpu: bool, budget: float) -> float:
    """The median of as many calls as fit in `budget` seconds, of 5 to 50."""
    timer = timed_on_gpu if on_gpu else timed
    for _ in range(2):
        timer(call)
    once = timer(call)
    if on_gpu and once < REPLAYED_BELOW * 1e-3:
        try:
            call = replayed(call)
        except RuntimeError as error:  # some peers cannot be captured
            print(f"    not replayed: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
        timer(call)
    count = int(max(5, min(50, budget / max(once, 1e-6))))
    return 1000 * statistics.median(timer(call) for _ in range(count))


def core_inputs(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, gate=None, mask=None)


def spacings_above_rounding(inputs: Inputs) -> float:
    """The core's largest error less that of rounding, in spacings of the dtype at the largest result; a few batch rows."""
    tensors = [t if t is None or t.size(0) == 1 else t[:4] for t in inputs.tensors]
    with torch.no_grad():
        out = peers.operator(*tensors)
        gold = peers.eager(*(None if t is None else t.double() for t in tensors))
    spacing = torch.finfo(out.dtype).eps * 2 ** torch.frexp(gold.abs().max()).exponent.item() / 2
    error, rounding = ((x.double() - gold).abs().max().item() for x in (out, gold.to(out.dtype)))
    return (error - rounding) / spacing


def measure(shape: Shape, workload: Workload, device: str, budget: float) -> dict[str, Any]:
    on_gpu = device == "cuda"
    inputs = make_inputs(workload, DTYPES[shape.dtype], device=device)
    result: dict[str, Any] = {"shape": shape.name, "sizes": workload.describe(), "milliseconds": {}}
    if shape.core:
        inputs = core_inputs(inputs)
        result["spacings"] = spacings_above_rounding(inputs)
    for name in shape.paths:
        try:
            run = path(name)
            if run is None:
                continue
            ahead = milliseconds(lambda run=run: forward(run, inputs), on_gpu, budget)
            times = {"forward": ahead}
            if not shape.core:
                times["backward"] = milliseconds(lambda run=run: forward_backward(run, inputs), on_gpu, budget) - ahead
            result["milliseconds"][name] = times
        except Exception as error:  # a peer that cannot run is a finding; the next is to be timed
            result["milliseconds"][name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            if on_gpu:
                torch.cuda.empty_cache()
    return result


def beside(shape: Shape) -> str:
    """What a time is to be compared with."""
    length = shape.workload.q_len
    if shape.core:
        card, time_of_others = PUBLISHED[length]
        return f"; published, {card}: {time_of_others} ms"
    if shape.workload.name == f"T{length}" and shape.dtype == "bfloat16" and length in GOALS:
        return "; goal, H100: {} / {} ms".format(*GOALS[length])
    return ""


def line_of(result: dict[str, Any], shape: Shape) -> str:
    def told(times: dict[str, Any]) -> str:
        return times.get("error") or " / ".join(f"{ms:.3f}" for ms in times.values()) + " ms"

    if "error" in result:
        return f"{result['shape']:24} {result['error']}"
    text = f"{result['shape']:24} " + ", ".join(f"{name} {told(t)}" for name, t in result["milliseconds"].items())
    if shape.core:
        text += f", error {result['spacings']:.1f} spacings above rounding (published: {PUBLISHED_ERROR})"
    return text + beside(shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for times.jsonl")
    parser.add_argument("--seconds", type=float, default=100, help="after which no shape is begun (default 100)")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shrink", type=int, default=1, help="divide lengths by this, for a trial without a card")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    begin, failed = time.perf_counter(), False
    with (arguments.results / "times.jsonl").open("w", buffering=1) as lines:  # line by line
        lines.write(json.dumps({"machine": describe(arguments.device)}) + "\n")
        for shape in shapes():
            if arguments.shrink > 1 and "flex" in shape.paths:
                continue
            if time.perf_counter() - begin > arguments.seconds:
                print(f"{shape.name}: no time left")
                continue
            workload = shrunk(shape.workload, arguments.shrink) if arguments.shrink > 1 else shape.workload
            try:
                result = measure(shape, workload, arguments.device, budget=0.5 if arguments.device == "cuda" else 0.01)
            except Exception as error:  # not enough memory for the tensors, or a device in error
                result = {"shape": shape.name, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            failed |= "error" in result or "error" in result["milliseconds"].get("operator", {})
            lines.write(json.dumps(result) + "\n")
            print(line_of(result, shape), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
