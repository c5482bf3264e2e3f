# SPDX-License-Identifier: BSD-3-Clause
"""vmap, torch.func, forward mode and double backward: values, and which of them keep the fused kernels."""

from __future__ import annotations

import pytest
import torch
from called import BACKWARD, FORWARD, Called
from inputs import DIFFERENTIABLE, TENSORS, Inputs, draw
from torch import Tensor

from torch_gated_attn import gated_attention, gated_attention_with_lse, reference

NOTHING_MAPPED = dict.fromkeys(TENSORS)
IN_DIMS = {
    "everything": dict.fromkeys(TENSORS, 0),
    "inner dimensions": {"query": 1, "key": 2, "value": 0, "gate": -1, "bias": 1, "mask": 2},
    "gate and mask": {"gate": 0, "mask": 0},
    **{f"only {name}": {name: dim} for name, dim in zip(TENSORS, (0, 1, -1, 2, 0, 1), strict=True)},
}


def tangents_of(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in tensors)


@pytest.mark.parametrize("case", IN_DIMS)
def test_vmap(device, case):
    """Mapped calls equal a loop, in values and in gradients, with one call of each fused kernel."""
    n, in_dims = 3, tuple({**NOTHING_MAPPED, **IN_DIMS[case]}.values())
    calls = [draw(seed=seed, dtype=torch.float64, device=device, bias=(2, 9, 11), mask=(2, 1, 1, 11)) for seed in range(n)]
    stacked = [
        calls[0].tensors[i].clone() if dim is None else torch.stack([call.tensors[i] for call in calls], dim)
        for i, dim in enumerate(in_dims)
    ]
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in stacked]
    looped = [
        gated_attention_with_lse(*(x if dim is None else x.select(dim, i) for x, dim in zip(leaves, in_dims, strict=True)))
        for i in range(n)
    ]
    expected = [torch.stack(parts) for parts in zip(*looped, strict=True)]
    cotangents = tangents_of(tuple(expected), 9)
    expected_grads = torch.autograd.grad(expected, leaves[:5], cotangents)
    with Called() as called:
        mapped = torch.vmap(gated_attention_with_lse, in_dims=in_dims)(*leaves)
        grads = torch.autograd.grad(mapped, leaves[:5], cotangents)
    assert called.ours == [FORWARD, BACKWARD]
    for a, b in zip((*mapped, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_vmap_twice(device):
    inputs = draw(seed=3, dtype=torch.float64, device=device, batch=(3, 4, 2), mask="full")
    with Called() as called:
        mapped = torch.vmap(torch.vmap(gated_attention))(*inputs.tensors)
    assert called.ours == [FORWARD]
    torch.testing.assert_close(mapped, gated_attention(*inputs.tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out_dim", [1, -1])
def test_vmap_to_another_dimension(device, out_dim):
    inputs = draw(seed=3, dtype=torch.float64, device=device, batch=(3, 2))
    mapped = torch.vmap(gated_attention, out_dims=out_dim)(*inputs.tensors)
    expected = gated_attention(*inputs.tensors).movedim(0, out_dim)
    torch.testing.assert_close(mapped, expected, rtol=1e-12, atol=1e-12)


def test_batched_gradients(device):
    """A batch of cotangents through one graph, as jacobian(vectorize=True) does; the bias and the gate broadcast.

    PyTorch maps these with its older vmap, for which no operator outside it can have a rule: a call for each cotangent.
    """
    inputs = draw(seed=4, dtype=torch.float64, device=device, bias=(2, 9, 1), gate=(2, 1, 1), kv_heads=1)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    out, lse = gated_attention_with_lse(*leaves, inputs.mask)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(4, *x.shape, generator=generator, dtype=x.dtype).to(device) for x in (out, lse)]
    with Called() as called:
        batched = torch.autograd.grad((out, lse), leaves, cotangents, is_grads_batched=True, retain_graph=True)
    assert called.ours == [BACKWARD] * 4
    for i in range(4):
        single = torch.autograd.grad((out, lse), leaves, [c[i] for c in cotangents], retain_graph=True)
        for a, b in zip(batched, single, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-11, atol=1e-11)


def small(device: str, seed: int = 6, **changes: object) -> Inputs:
    sizes = {"batch": (2,), "heads": 2, "kv_heads": 1, "q": 3, "k": 4, "d": 3, "mask": "full"}
    return draw(seed=seed, dtype=torch.float64, device=device, **{**sizes, **changes})


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jacrev", "jacfwd", "hessian", "jvp", "vjp"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_transforms_of_torch_func(device, transform):
    inputs = small(device)
    args = inputs.tensors[:5]
    every = tuple(range(5))

    def apply(function):
        whole = lambda *a: function(*a, inputs.mask)  # noqa: E731
        scalar = lambda *a: (whole(*a) * inputs.grad_out).sum()  # noqa: E731
        if transform == "grad":
            return torch.func.grad(scalar, every)(*args)
        if transform == "vmap of grad":
            per_entry = lambda *a: (function(*a[:6]) * a[6]).sum()  # noqa: E731
            return torch.vmap(torch.func.grad(per_entry, every))(*args, inputs.mask, inputs.grad_out)
        if transform == "jacrev":
            return torch.func.jacrev(whole, every)(*args)
        if transform == "jacfwd":
            return torch.func.jacfwd(whole, every)(*args)
        if transform == "hessian":
            return torch.func.hessian(scalar, every)(*args)
        if transform == "jvp":
            return torch.func.jvp(whole, args, tangents_of(args, 7))
        out, pullback = torch.func.vjp(whole, *args)
        return out, pullback(inputs.grad_out)

    ours, theirs = apply(gated_attention), apply(reference.gated_attention)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("masked_rows", ["zero", "mean"])
@pytest.mark.parametrize("changes", [{}, {"gate": "head", "bias": (1, 3, 1)}, {"gate": None, "bias": None}], ids=str)
def test_double_backward_values(device, changes, masked_rows):
    """The gradient of a random function of all first gradients; one row attends to nothing."""
    inputs = small(device, seed=10, masked_rows=masked_rows, **changes)
    inputs.mask[0, 0, 1] = False
    results = []
    for function in (gated_attention, reference.gated_attention):
        call = inputs.map(lambda x: x.detach().requires_grad_())
        leaves = [x for x in call.tensors[:5] if x is not None]
        out = function(*call.tensors, **call.options)
        first = torch.autograd.grad(out, leaves, call.grad_out, create_graph=True)
        second = torch.autograd.grad(first, [*leaves, call.grad_out], tangents_of(first, 11))
        results.append((first, second))
    for (first, second), (expected_first, expected_second) in [results]:
        torch.testing.assert_close(first, expected_first, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(second, expected_second, rtol=1e-10, atol=1e-11)
        assert all(x.any() for x in second)


@pytest.mark.parametrize("only", [None, *DIFFERENTIABLE])
def test_forward_mode_values(device, only):
    """Tangents of every argument, or of one."""
    inputs = draw(seed=8, dtype=torch.float64, device=device, mask="full")
    tangents = tangents_of(inputs.tensors[:5], 7)
    results = []
    for function in (gated_attention_with_lse, reference.gated_attention_with_lse):
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(x, t) if only in (None, name) else x
                for name, x, t in zip(DIFFERENTIABLE, inputs.tensors[:5], tangents, strict=True)
            ]
            unpacked = [torch.autograd.forward_ad.unpack_dual(x) for x in function(*duals, inputs.mask)]
            results.append(
                [(primal.clone(), tangent if tangent is None else tangent.clone()) for primal, tangent in unpacked]
            )
    assert results[1][0][1].any()
    for ours, theirs in zip(*results, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # PyTorch's formula has no tangent of lse where only value or gate has one; the operator's may be zeros.
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None and a is not None else b, rtol=1e-11, atol=1e-12)


def test_what_takes_the_fused_kernels(device):
    """The table in docs/pytorch.md: these stay fused, the others become the formula that allocates [*, H, Q, K]."""
    inputs = small(device, lse=False)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    scalar = lambda *a: gated_attention(*a, inputs.mask).sum()  # noqa: E731

    def ours(function) -> list[str]:
        with Called() as called:
            function()
        return called.ours

    first = lambda **options: torch.autograd.grad(scalar(*leaves), leaves, **options)  # noqa: E731
    assert ours(first) == [FORWARD, BACKWARD]
    assert ours(lambda: torch.vmap(gated_attention)(*inputs.tensors)) == [FORWARD]
    assert ours(lambda: first(create_graph=True)) == [FORWARD]
    assert ours(lambda: torch.func.grad(scalar)(*inputs.tensors[:5])) == []
    assert ours(lambda: torch.func.jvp(scalar, inputs.tensors[:5], inputs.tensors[:5])) == []
