# SPDX-License-Identifier: BSD-3-Clause
"""A linear layer that knows how AlphaFold starts it."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Linear", "haiku_limit"]


class Linear(nn.Linear):
    """`nn.Linear` with AlphaFold's start, which is the layer's own: after construction on the meta device each submodule is
    reset by itself, in any order, so a start that the parent sets would be lost.

    Args:
        inputs, outputs: `in_features` and `out_features`.
        limit: weights are uniform between -limit and limit.
        std: deviation of normal weights, if not 0: in place of `limit`.
        bias: where every element of the bias starts; None for a layer without one.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        limit: float = 0.0,
        std: float = 0.0,
        bias: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.weight_limit, self.weight_std = limit, std
        self.bias_start = 0.0 if bias is None else bias
        super().__init__(inputs, outputs, bias=bias is not None, device=device, dtype=dtype)  # calls reset_parameters

    def reset_parameters(self) -> None:
        if self.weight_std > 0:
            nn.init.normal_(self.weight, std=self.weight_std)
        else:
            nn.init.uniform_(self.weight, -self.weight_limit, self.weight_limit)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.bias_start)


def haiku_limit(receptive: int, fan_in: int, fan_out: int) -> float:
    """Limit of uniform variance scaling by the mean fan. Haiku multiplies both fans by the product of all leading
    dimensions of the (3-D) weight, its "receptive field", though nothing is a convolution here; the limit is part of
    AlphaFold."""
    fans = receptive * (fan_in + fan_out)
    return float((6.0 / fans) ** 0.5) if fans > 0 else 0.0
