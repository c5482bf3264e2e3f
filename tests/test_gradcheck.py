# SPDX-License-Identifier: BSD-3-Clause
"""Analytic gradients against finite differences in float64, for every subset of arguments that require one."""

from __future__ import annotations

import itertools

import pytest
import torch
from inputs import DIFFERENTIABLE, POLICIES, Inputs, draw

from torch_gated_attn import gated_attention, gated_attention_with_lse

SUBSETS = [subset for n in range(6) for subset in itertools.combinations(DIFFERENTIABLE, n)]


def make(**changes) -> Inputs:
    """Two query heads to a key head, a bias shared over the batch, a mask that differs by row."""
    sizes = {"batch": (2,), "heads": 2, "kv_heads": 1, "q": 3, "k": 4, "d": 3, "dv": 2, "bias": (1, 2, 3, 4)}
    return draw(**{"seed": 1, "dtype": torch.float64, "mask": (2, 1, 3, 4), **sizes, **changes})


def leaves(inputs: Inputs, subset: tuple[str, ...] = DIFFERENTIABLE) -> list[torch.Tensor | None]:
    return [
        x if x is None else x.detach().requires_grad_(name in subset)
        for name, x in zip(DIFFERENTIABLE, inputs.tensors[:5], strict=True)
    ]


def out_only(inputs: Inputs):
    return lambda *args: gated_attention(*args, inputs.mask, **inputs.options)


def out_and_lse(inputs: Inputs):
    return lambda *args: gated_attention_with_lse(*args, inputs.mask, **inputs.options)


@pytest.mark.parametrize("subset", SUBSETS[1:], ids="-".join)
def test_every_subset_of_arguments(device, subset):
    inputs = make(device=device)
    inputs.mask[0, :, 1] = False  # one fully masked row
    for masked_rows in POLICIES:
        inputs.masked_rows = masked_rows
        assert torch.autograd.gradcheck(out_only(inputs), leaves(inputs, subset))


@pytest.mark.parametrize("subset", SUBSETS[1:], ids="-".join)
def test_every_subset_of_arguments_with_lse(device, subset):
    inputs = make(device=device)  # every row attends to a key: lse is finite
    assert torch.autograd.gradcheck(out_and_lse(inputs), leaves(inputs, subset))


def test_nothing_requires_grad(device):
    inputs = make(device=device)
    out, lse = out_and_lse(inputs)(*leaves(inputs, ()))
    assert not out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("subset", SUBSETS[1:], ids="-".join)
def test_only_what_requires_grad_gets_one(device, subset):
    inputs = make(device=device)
    arguments = leaves(inputs, subset)
    out_only(inputs)(*arguments).backward(inputs.grad_out)
    for name, argument in zip(DIFFERENTIABLE, arguments, strict=True):
        assert (argument.grad is not None) == (name in subset), name
        if name in subset:
            assert (argument.grad != 0).any(), name


VARIANTS = {
    "no gate": {"gate": None},
    "no bias": {"bias": None},
    "no mask": {"mask": None},
    "nothing optional": {"gate": None, "bias": None, "mask": None},
    "gate per head": {"gate": "head"},
    "gate of one query": {"gate": (1, 2, 1, 2)},
    "low-rank bias": {"bias": (3, 1)},
    "full bias": {"bias": "full"},
    "two batch dimensions": {"batch": (2, 2), "bias": (2, 1, 2, 3, 4), "mask": (1, 2, 1, 1, 4)},
    "bias over the second": {"batch": (2, 2), "bias": (1, 2, 2, 3, 4), "mask": "key"},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -0.7},
    "four heads, two groups": {"heads": 4, "kv_heads": 2, "bias": (4, 1, 4)},
    "no head_dim": {"d": 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(device, variant):
    inputs = make(device=device, **VARIANTS[variant])
    arguments = leaves(inputs)
    assert torch.autograd.gradcheck(out_and_lse(inputs), arguments)


@pytest.mark.parametrize("variant", ["no gate", "gate per head", "low-rank bias", "negative scale", "full bias"])
def test_second_derivatives(device, variant):
    inputs = make(device=device, **VARIANTS[variant])
    assert torch.autograd.gradgradcheck(out_and_lse(inputs), leaves(inputs))


@pytest.mark.parametrize("masked_rows", POLICIES)
def test_second_derivatives_with_masked_rows(device, masked_rows):
    inputs = make(device=device, masked_rows=masked_rows)
    inputs.mask[0, :, 1] = False
    assert torch.autograd.gradgradcheck(out_only(inputs), leaves(inputs))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_of_one_argument(device, name):
    inputs = make(device=device)
    assert torch.autograd.gradgradcheck(out_only(inputs), leaves(inputs, (name,)))
