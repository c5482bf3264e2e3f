# SPDX-License-Identifier: BSD-3-Clause
"""One workload, timed over all paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .measure import DIRECTIONS, Timing, interleaved, timed, timed_on_gpu
from .peers import Path
from .workloads import Inputs, Workload


@dataclass
class Comparison:
    """One workload, dtype and direction over all paths."""

    workload: str
    title: str
    shape: str
    dtype: str
    direction: str
    timings: dict[str, Timing]

    def fastest_peer(self) -> str | None:
        peers = [name for name, timing in self.timings.items() if name != "operator" and not timing.error]
        return min(peers, key=lambda name: self.timings[name].best, default=None)

    def ratio(self, statistic: str = "best") -> float:
        """Time of the fastest peer over ours, both by the same statistic ("best" or "middle")."""
        peer = self.fastest_peer()
        if peer is None:
            return float("nan")
        return float(getattr(self.timings[peer], statistic) / getattr(self.timings["operator"], statistic))

    def as_json(self) -> dict[str, Any]:
        paths = {
            name: {"error": t.error} if t.error else {"min": t.best, "median": t.middle, "seconds": t.seconds}
            for name, t in self.timings.items()
        }
        own = {"workload": self.workload, "title": self.title, "shape": self.shape, "dtype": self.dtype}
        return {
            **own,
            "direction": self.direction,
            "paths": paths,
            "fastest_peer": self.fastest_peer(),
            "ratio_min": self.ratio(),
            "ratio_median": self.ratio("middle"),
        }


def compare(
    workload: Workload,
    dtype: str,
    direction: str,
    paths: dict[str, Path],
    inputs: Inputs,
    *,
    repeat: int,
    path_limit: float,
    before: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Times a direction of DIRECTIONS; the other arguments are those of `interleaved`."""
    run = DIRECTIONS[direction]
    calls = {name: partial(run, path, inputs) for name, path in paths.items()}
    timer = timed_on_gpu if inputs.query.is_cuda else timed
    timings = interleaved(calls, repeat, path_limit, timer, before)
    return Comparison(workload.name, workload.title, workload.describe(), dtype, direction, timings)
