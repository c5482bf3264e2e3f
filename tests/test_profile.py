# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch's own tools say of a call: floating-point operations, and names in a profile."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from inputs import DIFFERENTIABLE, draw
from torch.utils.flop_counter import FlopCounterMode

from torch_gated_attn import GatedAttention, gated_attention, reference

OPS = torch.ops.torch_gated_attn
SIZES = {"batch": (3,), "heads": 4, "kv_heads": 2, "q": 5, "k": 7, "d": 6, "dv": 10, "bias": (4, 5, 7)}
PRODUCT = 2 * 3 * 4 * 5 * 7  # of [*, H, Q, K] with vectors of one element, multiply and add


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_forward_flops_are_those_of_plain_pytorch(device):
    inputs = draw(seed=1, device=device, **SIZES)
    expected = count(lambda: reference.gated_attention(*inputs.tensors))
    assert count(lambda: gated_attention(*inputs.tensors)) == expected == PRODUCT * (6 + 10)


def test_backward_flops_are_those_of_plain_pytorch_and_the_logits(device):
    """For every subset of gradients: plain PyTorch saves the logits, the operator computes them again."""
    inputs = draw(seed=1, device=device, lse=False, **SIZES)
    for subset in itertools.chain.from_iterable(itertools.combinations(DIFFERENTIABLE, n) for n in range(1, 6)):
        leaves = [
            x.detach().requires_grad_(name in subset) for name, x in zip(DIFFERENTIABLE, inputs.tensors[:5], strict=True)
        ]
        wanted = [x for x in leaves if x.requires_grad]
        counts = []
        for function in (gated_attention, reference.gated_attention):
            out = function(*leaves, inputs.mask)
            counts.append(count(partial(torch.autograd.grad, out, wanted, inputs.grad_out)))
        logits = 0 if subset == ("gate",) else PRODUCT * 6
        assert counts[0] == counts[1] + logits, subset


def test_flops_by_module(device):
    module = GatedAttention(16, 4, device=device)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(2, 7, 16, device=device))
    counts = counter.get_flop_counts()["GatedAttention"]
    assert counts[OPS._gated_attention_forward] == 2 * 2 * 7 * 7 * 16 * 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler, about devices that are not there
def test_names_in_a_profile(device):
    inputs = draw(seed=1, device=device, lse=False)
    query = inputs.query.detach().requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        gated_attention(query, *inputs.tensors[1:]).backward(inputs.grad_out)
    shapes = {event.key: event.input_shapes for event in profile.key_averages(group_by_input_shape=True)}
    for name in ("gated_attention", "_gated_attention_forward", "_gated_attention_backward"):
        assert list(query.shape) in shapes[f"torch_gated_attn::{name}"]
    assert "torch_gated_attn" in gated_attention(query, *inputs.tensors[1:]).grad_fn.name()
    assert any("GatedAttention" in name and "autograd" in name for name in shapes), sorted(shapes)
