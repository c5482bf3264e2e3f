# SPDX-License-Identifier: BSD-3-Clause
"""Which kernel a call takes, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._arguments import check_call

__all__ = ["Explanation", "explain"]

_DIFFERENTIABLE = ("query", "key", "value", "gate", "bias")


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found out.

    Attributes:
        kernel: "query per lane" or "few queries" on a CPU; "tensor-core", "general tensor-core" or "plain" on a GPU;
            "sdpa" where PyTorch's attention computes the core and `gate_output` gates it; "composite" where no fused kernel
            takes the call and the formula runs, which stores all scores; "none" where
            the call has nothing to compute or the library was built without kernels for the device.
        reason: one sentence.
        device: what was asked about: "cpu", or the architecture of a GPU, such as "sm_90".
        details: facts that belong to the kernel, such as the instruction set or the head_dim it is compiled for.
    """

    kernel: str
    reason: str
    device: str
    details: Mapping[str, str] = field(default_factory=dict)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    masked_rows: str = "zero",
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Tensor | None = None,
    grad: Sequence[str] = (),
    device: str | None = None,
) -> Explanation:
    """Which kernel a call of :func:`gated_attention` takes, and why. It asks the very function that chooses in the call.

    Args:
        query, key, value, gate, bias, mask, scale, masked_rows, is_causal, window, key_lengths: as for
            :func:`gated_attention`. Only dtypes, shapes, strides and alignment are looked at, so tensors on the meta device
            do.
        grad: names of the arguments whose gradients are asked for ("query", ..., "bias"): the kernels of the backward are
            explained. Empty: those of the forward.
        device: "cpu", or "sm_" and a compute capability ("sm_90"), for the answer as if on that device, whether or not this
            machine has one; None: the device of the tensors.

    Raises:
        TypeError, ValueError: what the call itself would raise, a name in `grad` that is no differentiable argument given,
            or a device of another form.
    """
    check_call(query, key, value, gate, bias, mask, key_lengths, scale)
    tensors = {"query": query, "key": key, "value": value, "gate": gate, "bias": bias, "mask": mask}
    for name in grad:
        if name not in _DIFFERENTIABLE or tensors[name] is None:
            given = ", ".join(n for n in _DIFFERENTIABLE if tensors[n] is not None)
            raise ValueError(f"grad must name arguments that are given and have gradients ({given}), but names {name!r}")
    where = _device(query) if device is None else device
    if where != "cpu" and not re.fullmatch(r"sm_[1-9]\d{1,2}", where):
        raise ValueError(f'device must be "cpu" or like "sm_90", but is {where!r}')
    from . import _C

    tensors["key_lengths"] = key_lengths
    arch = None if where == "cpu" else int(where[3:])
    kernel, reason, details = _C.explain(
        [_layout(t) for t in tensors.values()],
        scale,
        masked_rows,
        is_causal,
        window,
        bias is not None and bias.requires_grad,
        [name in grad for name in _DIFFERENTIABLE],
        arch,
    )
    if arch is not None and _C.cuda_version is None and kernel not in ("none", "sdpa"):
        if query.device.type == "cuda":
            return Explanation("none", "this library was built without CUDA kernels", where)
        reason += "; this library was built without CUDA kernels"
    return Explanation(kernel, reason, where, details)


def _device(query: Tensor) -> str:
    if query.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(query.device)
        return f"sm_{major}{minor}"
    if query.device.type != "cpu":
        raise ValueError(f'device must be given ("cpu", or like "sm_90") for tensors on {query.device.type}')
    return "cpu"


def _layout(tensor: Tensor | None) -> tuple[str, tuple[int, ...], tuple[int, ...], int] | None:
    if tensor is None:
        return None
    # An allocation begins at a multiple of 256 bytes.
    address = int(tensor.storage_offset()) * tensor.element_size() if tensor.is_meta else tensor.data_ptr()
    return (
        str(tensor.dtype).removeprefix("torch."),
        tuple(map(int, tensor.shape)),
        tuple(map(int, tensor.stride())),
        address % 256,
    )
