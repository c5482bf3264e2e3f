# SPDX-License-Identifier: BSD-3-Clause
"""Timing of several paths in one process, in turn, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch

from .peers import Path, eager
from .workloads import Inputs

SHORT_SECONDS = 0.02  # a run shorter than this is repeated within its turn: caches and clocks settle on one path
TURN_CALLS = 5


@dataclass
class Timing:
    seconds: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def middle(self) -> float:
        return median(self.seconds)


def forward(path: Path, inputs: Inputs) -> None:
    with torch.no_grad():
        path(*inputs.tensors)


def forward_backward(path: Path, inputs: Inputs) -> None:
    torch.autograd.grad(path(*inputs.tensors), list(inputs.differentiable.values()), inputs.grad_out)


DIRECTIONS: dict[str, Callable[[Path, Inputs], None]] = {"forward": forward, "forward+backward": forward_backward}


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed_on_gpu(call: Callable[[], None]) -> float:
    """From event to event on the current stream: what the GPU took, and the launches where those are slower."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def interleaved(
    calls: Mapping[str, Callable[[], None]],
    repeat: int,
    path_limit: float,
    timer: Callable[[Callable[[], None]], float] = timed,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """One untimed call each, then `repeat` turns; a path stops after two turns once it has used `path_limit` seconds.

    `before` is called with the name of each path before each of its 1 + `repeat` turns, also those it is left out of.
    """
    timings = {name: Timing() for name in calls}
    for name, call in calls.items():
        before(name)
        try:
            call()  # compilation, thread start, page faults
        except Exception as error:  # a peer that cannot run this workload is a finding, not a reason to stop
            if name == "operator":
                raise
            timings[name].error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for turn in range(repeat):
        for name, call in calls.items():
            before(name)
            timing = timings[name]
            if timing.error or (turn >= 2 and sum(timing.seconds) > path_limit):
                continue
            timing.seconds.append(timer(call))
            if timing.seconds[-1] < SHORT_SECONDS:
                timing.seconds.extend(timer(call) for _ in range(TURN_CALLS - 1))
    return timings


def differences(path: Path, inputs: Inputs) -> dict[str, float]:
    """Largest difference of out and each gradient from `eager` in float64, relative to the largest element.

    Shows that the timed paths compute the same thing; the test suite has the real tolerances.
    """
    exact = _upcast(inputs)
    results = []
    for run, arguments in ((path, inputs), (eager, exact)):
        out = run(*arguments.tensors)
        gradients = torch.autograd.grad(out, list(arguments.differentiable.values()), arguments.grad_out)
        attended = out.detach() * inputs.mask.any(-1, keepdim=True)
        results.append({"out": attended, **dict(zip(arguments.differentiable, gradients, strict=True))})
    ours, gold = results
    return {name: float((ours[name].double() - gold[name]).abs().max() / gold[name].abs().max()) for name in gold}


def _upcast(inputs: Inputs) -> Inputs:
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.differentiable.items()}
    return Inputs(
        double["query"],
        double["key"],
        double["value"],
        double.get("gate"),
        double.get("bias"),
        inputs.mask,
        inputs.grad_out.double(),
    )
