# SPDX-License-Identifier: BSD-3-Clause
"""Autocast: query, key, value and gate in low precision, a float32 bias as it is, gradients in the leaves' dtype."""

from __future__ import annotations

import pytest
import torch
from inputs import HALF, draw

from torch_gated_attn import GatedAttention, gated_attention, gated_attention_with_lse

LOW = ("query", "key", "value", "gate")


@pytest.mark.parametrize("dtype", HALF)
def test_low_precision_but_not_for_the_bias(device, dtype):
    inputs = draw(seed=9, device=device, lse=False)
    with torch.autocast(device, dtype):
        out, lse = gated_attention_with_lse(*inputs.tensors)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    low = inputs.replace(**{name: getattr(inputs, name).to(dtype) for name in LOW})
    assert torch.equal(out, gated_attention(*low.tensors))
    assert not torch.equal(out, gated_attention(*low.replace(bias=low.bias.to(dtype)).tensors))


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_have_the_dtype_of_the_leaves(device, dtype):
    inputs = draw(seed=9, device=device, lse=False)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    with torch.autocast(device, dtype):
        out = gated_attention(*leaves, inputs.mask)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out.to(dtype))
    low = [x.to(dtype) if name in LOW else x for name, x in zip((*LOW, "bias"), leaves, strict=True)]
    expected = torch.autograd.grad(gated_attention(*low, inputs.mask), leaves, inputs.grad_out.to(dtype))
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert grad.any()
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", HALF)
def test_mixed_inputs(device, dtype):
    """Query and key from a norm, which autocast keeps in float32, beside value and gate from linear layers."""
    inputs = draw(seed=10, device=device, lse=False)
    low = inputs.replace(**{name: getattr(inputs, name).to(dtype) for name in LOW})
    mixed = inputs.replace(value=low.value, gate=low.gate)
    with pytest.raises(TypeError, match="value must have query's dtype"):
        gated_attention(*mixed.tensors)
    mixed = mixed.map(lambda x: x.detach().requires_grad_())
    with torch.autocast(device, dtype):
        out = gated_attention(*mixed.tensors)
    assert torch.equal(out, gated_attention(*low.tensors))
    for x, grad in zip(mixed.tensors[:5], torch.autograd.grad(out, mixed.tensors[:5], low.grad_out), strict=True):
        assert grad.dtype == x.dtype
        assert grad.any()


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.bfloat16])
def test_other_biases(device, bias_dtype):
    inputs = draw(seed=11, device=device, bias_dtype=bias_dtype, lse=False)
    with torch.autocast(device, torch.bfloat16):
        out = gated_attention(*inputs.tensors)
    low = inputs.replace(**{name: getattr(inputs, name).bfloat16() for name in LOW}, bias=inputs.bias.float())
    assert torch.equal(out, gated_attention(*low.tensors))


def test_float64_is_left_alone(device):
    inputs = draw(seed=12, dtype=torch.float64, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = gated_attention(*inputs.tensors)
    assert torch.equal(out, gated_attention(*inputs.tensors))


@pytest.mark.parametrize("dtype", HALF)
def test_module(device, dtype):
    module = GatedAttention(16, 4, device=device, zero_init=False)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    targets = [bias, *module.parameters()]
    with torch.autocast(device, dtype):
        out = module(x, bias=bias)
    assert out.dtype == dtype
    expected = module(x, bias=bias)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
    grads = torch.autograd.grad(out, targets, cotangent.to(dtype))
    for grad, wanted in zip(grads, torch.autograd.grad(expected, targets, cotangent), strict=True):
        assert grad.dtype == torch.float32
        assert wanted.any()
        torch.testing.assert_close(grad, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
