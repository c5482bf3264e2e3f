# SPDX-License-Identifier: BSD-3-Clause
"""Do two Evoformers that differ in their attention compute the same thing? Judged against float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    names, parameters = zip(*model.named_parameters())
    loss = model.loss(example)
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters)))


def check_first_step(plain: Evoformer, fused: Evoformer, example: Example) -> list[Check]:
    """Loss and gradients before training.

    The yardstick is the plain model in float64. A gradient passes if its largest error is at most GRADIENT_FACTOR times
    the error of plain float32, plus one rounding of its largest element.
    """
    _, gold = gradients(copy.deepcopy(plain).double(), example)
    plain_loss, plain_grads = gradients(plain, example)
    fused_loss, fused_grads = gradients(fused, example)

    worst_name, worst = "", 0.0
    for name, exact in gold.items():
        if not exact.any():
            raise AssertionError(f"the gradient of {name} is zero, so comparing it shows nothing")
        error = float((fused_grads[name] - exact).abs().max())
        allowed = GRADIENT_FACTOR * float((plain_grads[name] - exact).abs().max())
        allowed += torch.finfo(torch.float32).eps * float(exact.abs().max())
        if error / allowed >= worst:
            worst_name, worst = name, error / allowed
    difference = abs(fused_loss - plain_loss) / abs(plain_loss)
    return [
        Check("step 1, loss, relative difference", f"{difference:.1e}", f"{FIRST_LOSS_TOLERANCE:.0e}",
              difference <= FIRST_LOSS_TOLERANCE),
        Check(f"step 1, {len(gold)} gradients against float64, worst error / allowed ({worst_name})", f"{worst:.2f}",
              "1", worst <= 1),
    ]  # fmt: skip


def check_losses(runs: Sequence[Run]) -> Check:
    worst = max(abs(a - b) / abs(a) for a, b in zip(runs[0].losses, runs[1].losses))
    return Check("every later loss, relative difference", f"{worst:.1e}", f"{LATER_LOSS_TOLERANCE:.0e}",
                 worst <= LATER_LOSS_TOLERANCE)  # fmt: skip
