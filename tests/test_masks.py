# SPDX-License-Identifier: BSD-3-Clause
"""What a mask or a bias of -inf takes out leaves no trace, and rows with nothing left follow `masked_rows`."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import DTYPES, POLICIES, Inputs, assert_identical, draw, evaluate
from tolerance import Judge

from torch_gated_attn import gated_attention, gated_attention_with_lse

BATCH, HEADS, Q, K, D = (2, 3), 2, 18, 35, 8


def make(seed: int = 0, **changes) -> Inputs:
    return draw(**{"seed": seed, "batch": BATCH, "heads": HEADS, "q": Q, "k": K, "d": D, "mask": "full", **changes})


# Which part of the mask [2, 3, HEADS, Q, K] is all False.
DEAD = {
    "one row": (0, 0, 0, 3),
    "first rows": (slice(None), slice(None), slice(None), slice(0, 5)),
    "last row": (slice(None), slice(None), slice(None), -1),
    "every second row": (slice(None), slice(None), slice(None), slice(None, None, 2)),
    "one head": (slice(None), slice(None), 1),
    "one batch entry": (1, 2),
    "everything": (slice(None),),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked_rows", POLICIES)
def test_fully_masked_rows(device, dtype, masked_rows):
    judge = Judge()
    for i, (name, index) in enumerate(DEAD.items()):
        for gate in ("full", "head", None):
            inputs = make(i, dtype=dtype, device=device, masked_rows=masked_rows, gate=gate)
            inputs.mask[index] = False
            results = judge.compare(f"{name} gate={gate}", inputs)
            dead = ~inputs.mask.any(-1)
            assert dead.any()
            assert (results["lse"][dead] == -math.inf).all()
            assert (results["d_query"][dead] == 0).all()
            assert (results["d_bias"][dead] == 0).all()
            if masked_rows == "zero":
                assert (results["out"][dead] == 0).all()
    judge.verdict()


@pytest.mark.parametrize("masked_rows", POLICIES)
def test_fully_masked_rows_by_a_mask_of_keys(device, masked_rows):
    judge = Judge()
    for dtype in DTYPES:
        inputs = make(dtype=dtype, device=device, masked_rows=masked_rows, mask="key", bias=(2, 1, HEADS, Q, K))
        inputs.mask[0, 1] = False
        judge.compare(f"{dtype}", inputs)
        judge.compare(f"{dtype} one mask", inputs.replace(mask=torch.zeros(K, dtype=torch.bool, device=device)))
        judge.compare(f"{dtype} one value", inputs.replace(mask=torch.zeros((), dtype=torch.bool, device=device)))
    judge.verdict()


@pytest.mark.parametrize("masked_rows", POLICIES)
def test_fully_masked_rows_of_a_head_group(device, masked_rows):
    judge = Judge()
    for kv_heads in (1, 2):
        inputs = make(device=device, masked_rows=masked_rows, heads=4, kv_heads=kv_heads)
        inputs.mask[:, :, 1] = False
        inputs.mask[1, 1, :, 2:7] = False
        judge.compare(f"Hkv={kv_heads}", inputs)
    judge.verdict()


@pytest.mark.parametrize("masked_rows", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_minus_infinity_excludes(device, dtype, masked_rows):
    judge = Judge()
    for seed, with_mask in ((1, False), (2, True)):
        inputs = make(seed, dtype=dtype, device=device, masked_rows=masked_rows, mask="full" if with_mask else None)
        inputs.bias[..., K // 2 :] = -math.inf
        inputs.bias[..., 2, :] = -math.inf  # a row without a key, by the bias alone
        inputs.bias[0, 0, 0, 4, :] = -math.inf
        inputs.bias[0, 0, 0, 4, K - 1] = 0.5  # a row whose only key is the last
        if with_mask:
            inputs.mask[0, 0, 0, 4, K - 1] = True
        results = judge.compare(f"mask={with_mask}", inputs)
        assert (results["lse"][..., 2] == -math.inf).all()
    judge.verdict()


def test_mask_and_bias_of_minus_infinity_agree(device):
    inputs = make(device=device, bias="full")
    as_bias = inputs.replace(mask=None, bias=inputs.bias.masked_fill(~inputs.mask, -math.inf))
    a, b = evaluate(gated_attention_with_lse, inputs), evaluate(gated_attention_with_lse, as_bias)
    for name, result in a.items():
        torch.testing.assert_close(result, b[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, "finfo.max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_and_values_leave_no_trace(device, dtype, poison):
    """For a mask of keys, whatever a masked key or value holds, every bit of every result stays the same."""
    poison = torch.finfo(dtype).max if poison == "finfo.max" else poison
    clean = make(dtype=dtype, device=device, mask="key", bias=(2, 1, HEADS, Q, K))
    clean.mask[0, 1] = False  # nothing is attended here: under "zero" its values count for nothing
    masked = ~clean.mask.movedim(-1, -2).expand(*BATCH, HEADS, K, 1)
    poisoned = clean.replace(key=clean.key.masked_fill(masked, poison), value=clean.value.masked_fill(masked, poison))
    a, b = evaluate(gated_attention_with_lse, clean), evaluate(gated_attention_with_lse, poisoned)
    assert_identical(a, b, "masked keys or values")
    for name in ("d_key", "d_value"):
        assert (b[name].masked_select(masked) == 0).all(), f"{name} of a masked key is not 0"


def test_masked_key_may_be_nan_where_values_are_averaged(device):
    """Under "mean" a fully masked row reads every value, but no key."""
    clean = make(device=device, mask="key", masked_rows="mean")
    clean.mask[0, 1] = False
    masked = ~clean.mask.movedim(-1, -2).expand(*BATCH, HEADS, K, 1)
    poisoned = clean.replace(key=clean.key.masked_fill(masked, math.nan))
    a, b = evaluate(gated_attention_with_lse, clean), evaluate(gated_attention_with_lse, poisoned)
    assert_identical(a, b, "masked keys")


def test_bias_at_masked_keys_leaves_no_trace(device):
    clean = make(device=device, mask="key")
    poisoned = clean.replace(bias=clean.bias.masked_fill(~clean.mask, math.nan))
    a, b = evaluate(gated_attention_with_lse, clean), evaluate(gated_attention_with_lse, poisoned)
    assert_identical(a, b, "the bias of masked keys")


@pytest.mark.parametrize("low", [-1e9, "finfo.min"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_additive_masks(device, dtype, low):
    """A large negative bias on some keys acts as a mask there, and the bias still gets its gradient."""
    low = torch.finfo(dtype).min if low == "finfo.min" else low
    judge = Judge()
    for seed in range(3):
        inputs = make(seed, dtype=dtype, device=device, mask=None)
        hidden = torch.rand(Q, K, generator=torch.Generator().manual_seed(seed)) < 0.4
        hidden[:, 0] = False
        inputs.bias.masked_fill_(hidden.to(device), low)
        results = judge.compare(f"seed={seed}", inputs)
        assert (results["d_bias"][..., hidden] == 0).all()
        assert (results["d_bias"][..., ~hidden] != 0).any()
    judge.verdict()


@pytest.mark.parametrize("low", [-1e9, "finfo.min", "-finfo.max / 2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_pushed_down_as_a_whole(device, dtype, low):
    """Finite logits take part however low they are: such a row's probabilities still sum to 1, not to K or 0.

    With value = 1 the result is sigmoid(gate), and the sum over the keys of d_value is the sum over the queries of
    grad_out * sigmoid(gate), whichever probabilities the rounding left.
    """
    low = {"finfo.min": torch.finfo(dtype).min, "-finfo.max / 2": -torch.finfo(dtype).max / 2}.get(low, low)
    inputs = make(dtype=dtype, device=device, mask="key", lse=False)
    inputs.bias[..., 3:9, :] = low
    inputs = inputs.replace(value=torch.ones_like(inputs.value))
    results = evaluate(gated_attention_with_lse, inputs)
    eps = torch.finfo(dtype).eps
    gate = torch.sigmoid(inputs.gate.double())
    assert (results["out"].double() - gate).abs().max() <= 8 * eps
    expected = (inputs.grad_out.double() * gate).sum(-2)
    terms = (inputs.grad_out.double().abs() * gate).sum(-2).max()
    # Each of the K gradients of the sum is rounded once to the dtype.
    assert (results["d_value"].double().sum(-2) - expected).abs().max() <= 4 * eps * terms
    for name, result in results.items():
        assert result.isfinite().all(), name
    # As the dtype rounds it. Logits are held back at the lowest number times the scale, or, where they are kept in units of
    # log2, times ln 2.
    held_back = torch.finfo(torch.promote_types(dtype, torch.float32)).min * min(inputs.query.size(-1) ** -0.5, math.log(2))
    assert (results["lse"][..., 3:9] <= max(low, held_back) * 0.99).all()


@pytest.mark.parametrize("masked_rows", POLICIES)
def test_finite_low_logits_are_not_masked_rows(device, masked_rows):
    """finfo.min everywhere in a row is a shift, which the softmax ignores: no policy applies."""
    inputs = make(device=device, mask=None, masked_rows=masked_rows, scale=0.0)
    inputs.bias[..., 1, :] = torch.finfo(torch.float32).min
    out = gated_attention(*inputs.tensors, **inputs.options)
    expected = torch.sigmoid(inputs.gate[..., 1, :]) * inputs.value.mean(-2)
    torch.testing.assert_close(out[..., 1, :], expected, rtol=1e-5, atol=1e-6)


def test_a_single_attended_key_is_copied(device):
    """The result is value * sigmoid(gate) of that key, wherever it lies."""
    inputs = make(device=device)
    for j in (0, 1, 15, 16, K - 1):
        mask = torch.zeros(K, dtype=torch.bool, device=device)
        mask[j] = True
        out = gated_attention(*inputs.replace(mask=mask).tensors)
        torch.testing.assert_close(out, inputs.value[..., j : j + 1, :] * torch.sigmoid(inputs.gate), rtol=3e-7, atol=1e-7)
