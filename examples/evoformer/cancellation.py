# SPDX-License-Identifier: BSD-3-Clause
"""How much cancels in the gradient of each parameter.

A parameter's gradient is a sum over all positions it is used at. Its rounding error grows with the sum of the terms'
magnitudes, not with the result: a sum that happens to cancel has an error all the same.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


class SummedMagnitudes:
    """Records for each parameter of a model sum |terms| of its gradient in the last backward."""

    def __init__(self, model: nn.Module) -> None:
        self.by_parameter: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(partial(self._watch, name))

    def _watch(self, name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(partial(self._record, name, module, inputs[0].detach()))

    @torch.no_grad()
    def _record(self, name: str, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        grad = grad.abs().flatten(0, -2)  # [positions, outputs]
        if isinstance(module, nn.Linear):
            weight = grad.T @ x.abs().flatten(0, -2)
        elif isinstance(module, nn.LayerNorm):
            weight = (grad * nn.functional.layer_norm(x, module.normalized_shape).abs().flatten(0, -2)).sum(0)
        elif isinstance(module, nn.Embedding):
            weight = torch.zeros_like(module.weight).index_add_(0, x.flatten(), grad)
        else:
            raise TypeError(f"{name} must be a Linear, LayerNorm or Embedding, got {type(module).__name__}")
        self.by_parameter[f"{name}.weight"] = weight
        if getattr(module, "bias", None) is not None:
            self.by_parameter[f"{name}.bias"] = grad.sum(0)
