# SPDX-License-Identifier: BSD-3-Clause
"""Train one Evoformer per attention implementation, all on the same examples, one step of each in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from .data import IGNORE, Example, held_out_examples, training_example
from .model import AttentionFactory, Evoformer

LEARNING_RATE = 5e-3
WARM_UP = 10  # steps


@dataclass
class Run:
    """One model in training and what it has shown so far."""

    name: str
    model: Evoformer
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    accuracy: float = float("nan")
    step_mib: float | None = None

    @property
    def median_seconds(self) -> float:
        return median(self.step_seconds[1:] or self.step_seconds)  # the first step also warms up


def build_runs(factories: dict[str, AttentionFactory], seed: int = 0) -> list[Run]:
    """Models that differ in their attention only; all start from the parameters of the first."""
    runs = []
    for name, factory in factories.items():
        torch.manual_seed(seed)
        runs.append(Run(name, Evoformer(factory)))
    for run in runs[1:]:
        run.model.load_state_dict(runs[0].model.state_dict())
    return runs


def learning_rate(step: int, steps: int) -> float:
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)


def make_optimizer(model: Evoformer) -> torch.optim.Adam:
    # eps well above the rounding noise of a gradient that is truly zero: Adam would turn that noise into full steps.
    return torch.optim.Adam(model.parameters(), eps=1e-6)


def train_step(model: Evoformer, optimizer: torch.optim.Optimizer, example: Example) -> float:
    optimizer.zero_grad()
    loss = model.loss(example)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(runs: Sequence[Run], sequences: Tensor, steps: int, columns: int, seed: int = 0) -> None:
    """Taking turns, step by step, lets both runs feel the same disturbances of a shared machine."""
    optimizers = [make_optimizer(run.model) for run in runs]
    for step in range(steps):
        example = training_example(sequences, step, columns, seed)
        for run, optimizer in zip(runs, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            start = time.perf_counter()
            run.losses.append(train_step(run.model, optimizer, example))
            run.step_seconds.append(time.perf_counter() - start)
        show_progress(step + 1, steps, runs)


def show_progress(done: int, total: int, runs: Sequence[Run], width: int = 24) -> None:
    filled = width * done // total
    losses = "  ".join(f"{run.name} {run.losses[-1]:.4f}" for run in runs)
    line = f"[{'#' * filled}{'.' * (width - filled)}] step {done}/{total}  loss: {losses}"
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % max(1, total // 6) == 0 or done == total:  # a log file gets a few lines, not one per step
        print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def held_out_accuracy(model: Evoformer, train_rows: Tensor, held_out: Tensor, columns: int) -> float:
    """Share of the hidden residues of unseen sequences that the model names correctly."""
    right = asked = 0
    for example in held_out_examples(train_rows, held_out, columns):
        known = example.labels != IGNORE
        right += int((model(example).argmax(-1) == example.labels)[known].sum())
        asked += int(known.sum())
    return right / asked
