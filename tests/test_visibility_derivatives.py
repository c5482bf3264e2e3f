# SPDX-License-Identifier: BSD-3-Clause
"""Causal calls, windows and key lengths: derivatives of every order and direction, and vmap over every argument."""

from __future__ import annotations

import pytest
import torch
from called import BACKWARD, FORWARD, Called
from inputs import DIFFERENTIABLE, draw
from test_visibility_framework import SEEN, TORCHSCRIPT, leaves_of, small

from torch_gated_attn import gated_attention, gated_attention_with_lse, reference


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@TORCHSCRIPT
@pytest.mark.parametrize(("seen", "q"), [("causal", 3), ("window", 5), ("lengths", 2), ("all", 3)])
def test_derivatives_of_every_order(device, seen, q):
    """Against finite differences; with five queries to four keys, or a length of 2, some rows see nothing."""
    inputs = small(device, seen, q=q, bias=(2, q, 4))
    call = lambda *args: gated_attention(*args, inputs.mask, **inputs.options)  # noqa: E731
    leaves = leaves_of(inputs)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("seen", SEEN)
def test_derivatives_with_lse(device, seen):
    inputs = small(device, seen, q=2, bias=(2, 2, 4), key_lengths=[4, 4] if "key_lengths" in SEEN[seen] else None)
    call = lambda *args: gated_attention_with_lse(*args, inputs.mask, **inputs.options)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves_of(inputs))


NAMES = (*DIFFERENTIABLE, "key_lengths")


@pytest.mark.parametrize("mapped", [*[(name,) for name in NAMES], NAMES, ("query", "key_lengths")], ids="-".join)
def test_vmap(device, mapped):
    """One call of each kernel, whichever arguments are mapped, equal to a loop."""
    n = 3
    calls = [draw(seed=i, dtype=torch.float64, device=device, mask=None, bias=(2, 9, 11)) for i in range(n)]
    lengths = [torch.tensor([i, 11 - i], device=device) for i in range(n)]
    each = [dict(zip(NAMES, (*call.tensors[:5], length), strict=True)) for call, length in zip(calls, lengths, strict=True)]
    stacked = [torch.stack([x[name] for x in each], -1) if name in mapped else each[0][name].clone() for name in NAMES]
    leaves = [x.requires_grad_() for x in stacked[:5]]
    in_dims = tuple(-1 if name in mapped else None for name in NAMES)

    def call(query, key, value, gate, bias, key_lengths):
        return gated_attention_with_lse(query, key, value, gate, bias, is_causal=True, window=6, key_lengths=key_lengths)

    looped = [
        call(*(x if dim is None else x.select(dim, i) for x, dim in zip((*leaves, stacked[5]), in_dims, strict=True)))
        for i in range(n)
    ]
    expected = [torch.stack(parts) for parts in zip(*looped, strict=True)]
    cotangents = [torch.randn_like(expected[0]), torch.randn_like(expected[1])]
    expected_grads = torch.autograd.grad(expected, leaves, cotangents)
    with Called() as called:
        results = torch.vmap(call, in_dims=in_dims)(*leaves, stacked[5])
        grads = torch.autograd.grad(results, leaves, cotangents)
    assert called.ours == [FORWARD, BACKWARD]
    for a, b in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp", "jacrev", "dual numbers", "compiled jvp"])
@TORCHSCRIPT
def test_transforms(device, seen, transform):
    inputs = small(device, seen)
    args = inputs.tensors[:5]
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in args)
    options = {**inputs.options, "key_lengths": inputs.key_lengths}
    lengths = torch.tensor([4, 4], device=device) if inputs.key_lengths is None else inputs.key_lengths

    def apply(function):
        whole = lambda *a: function(*a, inputs.mask, **options)  # noqa: E731
        scalar = lambda *a: (whole(*a) * inputs.grad_out).sum()  # noqa: E731
        if transform == "grad":
            return torch.func.grad(scalar, (0, 1, 2, 3, 4))(*args)
        if transform == "vmap of grad":

            def of_entry(query, key, value, gate, bias, length, cotangent):
                return (function(query, key, value, gate, bias, **{**options, "key_lengths": length}) * cotangent).sum()

            in_dims = (0, 0, 0, 0, None, 0, 0)
            return torch.vmap(torch.func.grad(of_entry, (0, 1, 2, 3, 4)), in_dims)(*args, lengths, inputs.grad_out)
        if transform == "jacrev":
            return torch.func.jacrev(whole, (0, 4))(*args)
        if transform == "dual numbers":
            with torch.autograd.forward_ad.dual_level():
                duals = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(args, tangents, strict=True)]
                return [x.clone() for x in torch.autograd.forward_ad.unpack_dual(whole(*duals))]
        jvp = lambda *a: torch.func.jvp(whole, a, tangents)  # noqa: E731
        if transform == "compiled jvp" and function is gated_attention:
            return torch.compile(jvp, fullgraph=True, backend="aot_eager")(*args)
        return jvp(*args)

    torch.testing.assert_close(apply(gated_attention), apply(reference.gated_attention), rtol=1e-10, atol=1e-11)
