# SPDX-License-Identifier: BSD-3-Clause
"""Whether the numbers in a tensor can be looked at, so that what a call does may depend on them."""

from __future__ import annotations

import enum

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["Access", "access"]


class Access(enum.Enum):
    """What may be done with the numbers in a tensor."""

    READ = "read"  # they are here: `bool(tensor)` is right and free
    ASSERT = "assert"  # they will be where this runs: torch._assert_async ends a wrong guess
    NONE = "none"


def access(tensor: Tensor) -> Access:
    """READ for an ordinary CPU tensor in eager mode. ASSERT where reading would wait for a CUDA device or end a graph of
    torch.compile, and for the tensors of FakeTensorMode, so that it shows what those do.

    NONE under the transforms of torch.func (vmap has no rule for an assertion), under forward-mode differentiation, which a
    mask would cut, in torch.jit.trace, which keeps no assertion, in torch.export, whose assertions an export to ONNX drops,
    and in make_fx; on meta tensors and on subclasses such as DTensor.
    """
    if (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._functorch.get_dynamic_layer_stack_depth() > 0  # Dynamo follows this one
        or torch.autograd.forward_ad._current_level >= 0
        or type(tensor) not in (Tensor, nn.Parameter, FakeTensor)
        or tensor.device.type not in ("cpu", "cuda")
    ):
        return Access.NONE
    if torch.compiler.is_compiling():
        return Access.ASSERT
    if get_proxy_mode() is not None:
        return Access.NONE
    return Access.READ if type(tensor) is not FakeTensor and tensor.device.type == "cpu" else Access.ASSERT
