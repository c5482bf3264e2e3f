# SPDX-License-Identifier: BSD-3-Clause
"""bias, mask and gate broadcast over any subset of the dimensions, and a gradient is summed over the same ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from inputs import Inputs, draw, evaluate
from tolerance import Judge

from torch_gated_attn import gated_attention_with_lse

OUTER, INNER, HEADS, Q, K, DV = 3, 2, 4, 10, 21, 12
NAMES = ("outer", "inner", "head", "q", "last")
SUBSETS = [subset for n in range(6) for subset in itertools.combinations(range(5), n)]


def shape_without(subset: tuple[int, ...], last: int = K) -> tuple[int, ...]:
    """[OUTER, INNER, HEADS, Q, last] with size 1 in the dimensions of `subset`."""
    full = (OUTER, INNER, HEADS, Q, last)
    return tuple(1 if i in subset else size for i, size in enumerate(full))


def lower_rank(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.dropwhile(lambda size: size == 1, shape))


def make(seed: int, **changes) -> Inputs:
    return draw(seed=seed, batch=(OUTER, INNER), heads=HEADS, q=Q, k=K, d=8, dv=DV, **changes)


def label(what: str, subset: tuple[int, ...]) -> str:
    return f"{what} broadcast over {[NAMES[i] for i in subset]}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bias_over_every_subset(device, dtype):
    judge = Judge()
    for i, subset in enumerate(SUBSETS):
        shape = shape_without(subset)
        judge.compare(label("bias", subset), make(i, dtype=dtype, device=device, bias=shape))
        judge.compare(label("low-rank bias", subset), make(i, dtype=dtype, device=device, bias=lower_rank(shape)))
    judge.verdict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mask_over_every_subset(device, dtype):
    judge = Judge()
    for i, subset in enumerate(SUBSETS):
        shape = shape_without(subset)
        policy = "mean" if i % 2 else "zero"
        for kind, mask in (("mask", shape), ("low-rank mask", lower_rank(shape))):
            inputs = make(i, dtype=dtype, device=device, mask=mask, bias=(HEADS, Q, K), masked_rows=policy)
            judge.compare(label(kind, subset), inputs)
    judge.verdict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_over_every_subset(device, dtype):
    judge = Judge()
    for i, subset in enumerate(SUBSETS):
        shape = shape_without(subset, DV)
        for kind, gate in (("gate", shape), ("low-rank gate", lower_rank(shape))):
            judge.compare(label(kind, subset), make(i, dtype=dtype, device=device, gate=gate))
    judge.compare("no gate", make(0, dtype=dtype, device=device, gate=None))
    judge.verdict()


@pytest.mark.parametrize("step", [3])
def test_bias_mask_and_gate_together(device, step):
    """A third of all pairs of patterns of bias and mask, each with another pattern of the gate. There are 32 of each: an
    odd step meets all."""
    judge = Judge()
    for i, (a, b) in enumerate(itertools.product(SUBSETS, SUBSETS)):
        if i % step == 0:
            gate = shape_without(SUBSETS[i // step % 32], DV)
            inputs = make(i, device=device, bias=shape_without(a), mask=shape_without(b), gate=gate)
            judge.compare(f"{label('bias', a)}, {label('mask', b)}", inputs)
    judge.verdict()


def test_gate_that_is_a_strided_half_of_a_projection(device):
    projection = torch.randn(OUTER, INNER, Q, 2 * HEADS * DV, generator=torch.Generator().manual_seed(1)).to(device)
    halves = projection.chunk(2, dim=-1)
    query, gate = (half.unflatten(-1, (HEADS, DV)).transpose(-2, -3) for half in halves)
    inputs = draw(seed=2, device=device, batch=(OUTER, INNER), heads=HEADS, q=Q, k=K, d=DV)
    judge = Judge()
    judge.compare("chunked gate", inputs.replace(query=query, gate=gate))
    judge.verdict()


def test_broadcast_equals_expanded(device):
    """A bias or mask that is broadcast gives what it gives written out, up to the order of the sums."""
    for i, subset in enumerate(SUBSETS):
        broadcast = make(i, device=device, bias=shape_without(subset), mask=shape_without(subset[:3]))
        expanded = broadcast.replace(
            bias=broadcast.bias.expand(OUTER, INNER, HEADS, Q, K).contiguous(),
            mask=broadcast.mask.expand(OUTER, INNER, HEADS, Q, K).contiguous(),
        )
        a, b = evaluate(gated_attention_with_lse, broadcast), evaluate(gated_attention_with_lse, expanded)
        b["d_bias"] = b["d_bias"].double().sum_to_size(broadcast.bias.shape).float()
        for name, result in a.items():
            message = f"{label('bias', subset)}: {name}"
            torch.testing.assert_close(result, b[name], rtol=1e-5, atol=2e-5, msg=message)


def test_expanded_bias_gets_a_full_gradient(device):
    """A stride of 0 is a layout, not a broadcast: the gradient has the shape of the tensor that was passed."""
    inputs = make(0, device=device, bias=(1, 1, HEADS, Q, K))
    expanded = inputs.replace(bias=inputs.bias.expand(OUTER, INNER, HEADS, Q, K))
    judge = Judge()
    result = judge.compare("bias with strides of 0", expanded)
    judge.verdict()
    assert result["d_bias"].shape == (OUTER, INNER, HEADS, Q, K)
