# SPDX-License-Identifier: BSD-3-Clause
"""Drawing the arguments of a call, and evaluating a call with all its gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("query", "key", "value", "gate", "bias")
TENSORS = (*DIFFERENTIABLE, "mask")
POLICIES = ("zero", "mean")


@dataclasses.dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor | None
    scale: float | None = None
    masked_rows: str = "zero"
    is_causal: bool = False
    window: int | None = None
    key_lengths: Tensor | None = None

    def replace(self, **changes: object) -> Inputs:
        return dataclasses.replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with `function` applied to every floating-point tensor."""
        changes = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.is_floating_point():
                changes[field.name] = function(value)
        return self.replace(**changes)

    def to(self, dtype: torch.dtype) -> Inputs:
        return self.map(lambda x: x.to(dtype))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in TENSORS)

    @property
    def visibility(self) -> tuple[bool, int | None, Tensor | None]:
        return self.is_causal, self.window, self.key_lengths

    @property
    def options(self) -> dict[str, object]:
        """Those of visibility only where they say something: to most of the functions that are compared they are unknown."""
        options: dict[str, object] = {"scale": self.scale, "masked_rows": self.masked_rows}
        if self.visibility != (False, None, None):
            options |= dict(zip(("is_causal", "window", "key_lengths"), self.visibility, strict=True))
        return options


def draw_mask(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """About three in four keys attended. Where a row has several keys, never none of them and never all."""
    shape = tuple(shape)
    mask = torch.rand(shape, generator=generator) < 0.75
    if shape and shape[-1] > 1:
        picks = torch.rand(shape, generator=generator).argsort(dim=-1)
        mask.scatter_(-1, picks[..., :1], True).scatter_(-1, picks[..., 1:2], False)
    elif mask.numel() == 1:
        mask.fill_(True)
    return mask


def draw(
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: Sequence[int] = (2,),
    heads: int = 2,
    kv_heads: int | None = None,
    q: int = 9,
    k: int = 11,
    d: int = 8,
    dv: int | None = None,
    gate: str | Sequence[int] | None = "full",
    bias: str | Sequence[int] | None = "full",
    mask: str | Sequence[int] | None = "key",
    bias_dtype: torch.dtype | None = None,
    scale: float | None = None,
    masked_rows: str = "zero",
    lse: bool = True,
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Sequence[int] | Tensor | None = None,
) -> Inputs:
    """Random arguments of one call, with logits, bias and cotangents of size 1, so that none hides another.

    gate, bias and mask are a shape, None, or a name: "full", "head" (a gate per head), "key" (a mask of keys).
    """
    generator = torch.Generator().manual_seed(seed)
    dv = d if dv is None else dv
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = {"full": (*batch, heads, q, dv), "head": (*batch, heads, q, 1)}
    gate_shape = shapes[gate] if isinstance(gate, str) else gate
    bias_shape = (*batch, heads, q, k) if bias == "full" else bias
    mask_shape = {"full": (*batch, heads, q, k), "key": (*batch, 1, 1, k)}[mask] if isinstance(mask, str) else mask

    def normal(shape: Sequence[int] | None, kind: torch.dtype | None = None) -> Tensor | None:
        if shape is None:
            return None
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(device, kind or dtype)

    return Inputs(
        query=normal((*batch, heads, q, d)),
        key=normal((*batch, kv_heads, k, d)),
        value=normal((*batch, kv_heads, k, dv)),
        gate=normal(gate_shape),
        bias=normal(bias_shape, bias_dtype),
        mask=None if mask_shape is None else draw_mask(mask_shape, generator).to(device),
        grad_out=normal((*batch, heads, q, dv)),
        grad_lse=normal((*batch, heads, q), accumulation(dtype)) if lse else None,
        scale=scale,
        masked_rows=masked_rows,
        is_causal=is_causal,
        window=window,
        key_lengths=None if key_lengths is None else torch.as_tensor(key_lengths, device=device),
    )


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def evaluate(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, wrt: Sequence[str] = DIFFERENTIABLE
) -> dict[str, Tensor]:
    """out, lse and the gradients d_query, ... of `function` (one that also returns lse) at `inputs`.

    Each differentiable argument becomes a leaf with the same strides, so layouts survive.
    """
    leaves = {
        name: tensor.detach().requires_grad_(name in wrt)
        for name in DIFFERENTIABLE
        if (tensor := getattr(inputs, name)) is not None
    }
    call = inputs.replace(**leaves)
    out, lse = function(*call.tensors, **call.options)
    results = {"out": out.detach(), "lse": lse.detach()}
    targets = {name: leaf for name, leaf in leaves.items() if name in wrt}
    if targets:
        outputs, cotangents = [out], [inputs.grad_out]
        if inputs.grad_lse is not None:
            outputs.append(lse)
            cotangents.append(inputs.grad_lse.to(lse.dtype))
        grads = torch.autograd.grad(outputs, list(targets.values()), cotangents, allow_unused=True)
        results.update({f"d_{name}": grad for name, grad in zip(targets, grads, strict=True)})
    return results


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor], label: object) -> None:
    """The same results, bit for bit (NaN equals NaN)."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name].nan_to_num(7.7), b[name].nan_to_num(7.7))]
    assert not different, f"{different} differ for {label}"


def assert_same_with_gradients(result: Tensor, expected: Tensor, leaves: Sequence[Tensor]) -> None:
    """Value and gradients of two float64 computations agree, and no gradient vanishes."""
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(expected)
    for ours, true in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (result, expected)), strict=True):
        assert true.abs().max() > 1e-3
        torch.testing.assert_close(ours, true, rtol=1e-8, atol=1e-9)
