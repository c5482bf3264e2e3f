# SPDX-License-Identifier: BSD-3-Clause
"""Do two Evoformers that differ in their attention compute the same thing? Judged against float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cancellation import SummedMagnitudes
from .data import Example
from .model import Evoformer
from .train import Run

FIRST_LOSS_TOLERANCE = 1e-5
LATER_LOSS_TOLERANCE = 1e-2
GRADIENT_FACTOR = 3.0  # an independent rounding of the same sums; more would be a less accurate algorithm


@dataclass
class Check:
    claim: str
    measured: str
    limit: str
    passed: bool


def gradients(model: Evoformer, example: Example) -> tuple[float, dict[str, Tensor]]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = model.loss(example)
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def check_first_step(plain: Evoformer, fused: Evoformer, example: Example) -> list[Check]:
    """Loss and gradients before training.

    The yardstick is the plain model in float64. A gradient passes if its largest error is at most GRADIENT_FACTOR times
    the error of plain float32, plus one rounding of the terms that it sums (plain float32 may be exact by luck).
    """
    exact_model = copy.deepcopy(plain).double()
    magnitudes = SummedMagnitudes(exact_model)
    _, gold = gradients(exact_model, example)
    plain_loss, plain_grads = gradients(plain, example)
    fused_loss, fused_grads = gradients(fused, example)

    shares = []
    for name, exact in gold.items():
        if not exact.any():
            raise AssertionError(f"the gradient of {name} is zero, so comparing it shows nothing")
        allowed = GRADIENT_FACTOR * (plain_grads[name] - exact).abs().max()
        allowed += torch.finfo(torch.float32).eps * magnitudes.by_parameter[name].max()
        shares.append((fused_grads[name] - exact).abs().max() / allowed)
    worst, index = torch.stack(shares).max(0)  # as elsewhere here torch's max: unlike Python's it lets a NaN win
    worst_name = list(gold)[int(index)]
    difference = abs(fused_loss - plain_loss) / abs(plain_loss)
    return [
        Check(
            "step 1, loss, relative difference",
            f"{difference:.1e}",
            f"{FIRST_LOSS_TOLERANCE:.0e}",
            difference <= FIRST_LOSS_TOLERANCE,
        ),
        Check(
            f"step 1, {len(gold)} gradients against float64, worst error / allowed ({worst_name})",
            f"{worst:.2f}",
            "1",
            bool(worst <= 1),
        ),
    ]


def largest_loss_difference(runs: Sequence[Run]) -> float:
    plain, fused = (torch.tensor(run.losses, dtype=torch.float64) for run in runs)
    return float(((fused - plain) / plain).abs().max())


def check_losses(runs: Sequence[Run]) -> Check:
    worst = largest_loss_difference(runs)
    return Check(
        "every step, loss, relative difference",
        f"{worst:.1e}",
        f"{LATER_LOSS_TOLERANCE:.0e}",
        worst <= LATER_LOSS_TOLERANCE,
    )
