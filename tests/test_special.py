# SPDX-License-Identifier: BSD-3-Clause
"""Extreme scales, logits, gates and values, empty dimensions, and where a NaN may spread."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import DTYPES, HALF, POLICIES, assert_identical, draw, evaluate
from oracle import gold
from tolerance import Judge, largest

from torch_gated_attn import gated_attention, gated_attention_with_lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.7, 1e-30, 1e-40, 3.0])
def test_scales(device, dtype, scale):
    judge = Judge()
    for seed in range(3):
        inputs = draw(seed=seed, dtype=dtype, device=device, q=20, k=40, d=12, scale=scale, mask="full")
        judge.compare(f"scale={scale}", inputs)
    judge.verdict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e4, -1e6, 1e30])
def test_huge_scales_select_the_largest_logit(device, dtype, scale):
    """The softmax becomes the argmax; integers make the products exact, so that no rounding decides which."""
    inputs = draw(seed=3, dtype=dtype, device=device, q=20, k=40, d=12, scale=scale, bias=None, lse=False)
    inputs = inputs.map(lambda x: (4 * x).round())
    inputs.query[..., 0] = 1000  # distinct logits: the first coordinate of a key is its rank
    inputs.key[..., 0] = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(inputs.key)
    results = evaluate(gated_attention_with_lse, inputs)
    logits = (math.copysign(1, scale) * inputs.query @ inputs.key.mT).masked_fill(~inputs.mask, -math.inf)
    winner = logits.argmax(-1, keepdim=True).expand(*logits.shape[:-1], 12)
    expected = inputs.value.gather(-2, winner) * torch.sigmoid(inputs.gate)
    torch.testing.assert_close(results["out"], expected, rtol=1e-6, atol=1e-7)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked_rows", POLICIES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"k": 0},
        {"q": 0},
        {"batch": (0,)},
        {"batch": (3, 0, 2)},
        {"heads": 0},
        {"d": 0, "dv": 5},
        {"d": 5, "dv": 0},
        {"d": 0, "dv": 0},
        {"k": 0, "q": 0},
        {"k": 0, "d": 0},
    ],
    ids=str,
)
def test_empty_dimensions(device, dtype, masked_rows, sizes):
    judge = Judge()
    for kinds in ({}, {"gate": None, "bias": None, "mask": None}, {"gate": "head", "mask": "full"}):
        inputs = draw(**{"seed": 4, "dtype": dtype, "device": device, "masked_rows": masked_rows, **kinds, **sizes})
        judge.compare(f"{kinds}", inputs)
    judge.verdict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_logits(device, dtype):
    """Logits of +-1e4 in every order: rising, falling, the largest last, all equal."""
    n = 150
    ramp = torch.linspace(-1e4, 1e4, n, dtype=dtype, device=device)
    steps = torch.arange(n, dtype=dtype, device=device)
    last = torch.where(steps == n - 1, 1e4, -steps)
    judge = Judge()
    for name, row in {
        "rising": ramp,
        "falling": ramp.flip(0),
        "slowly rising": steps,
        "slowly falling": -steps,
        "largest last": last,
        "constant": torch.full_like(ramp, 1e4),
        "constant low": torch.full_like(ramp, -1e4),
    }.items():
        inputs = draw(seed=5, dtype=dtype, device=device, q=17, k=n, d=8, bias="full", mask="key")
        judge.compare(name, inputs.replace(bias=inputs.bias + row))
    judge.verdict()


def test_products_beyond_float16(device):
    """<q, k> passes 65504, the largest float16, though the logit does not: the product is float32."""
    inputs = draw(seed=6, dtype=torch.float16, device=device, q=20, k=40, d=64, scale=1e-5, bias="full")
    inputs = inputs.replace(query=inputs.query * 60, key=inputs.key * 60)
    inputs.query[..., 0, :], inputs.key[..., 1, :] = 60, 60
    assert (inputs.query.float() @ inputs.key.float().mT).max() > 65504
    true = gold(inputs)  # plain PyTorch overflows in float16 and cannot be the yardstick
    for name, result in evaluate(gated_attention_with_lse, inputs).items():
        bound = 4 * torch.finfo(inputs.query.dtype).eps * largest(true[f"terms_{name}"])
        assert largest(result.double().cpu() - true[name]) <= bound, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_near_the_largest_number(device, dtype):
    """A weighted mean of large values does not overflow: in float16 up to the largest, elsewhere up to it over K."""
    k_len = 64
    inputs = draw(seed=7, dtype=dtype, device=device, q=9, k=k_len, d=8, lse=False)
    top = torch.finfo(dtype).max / (1 if dtype == torch.float16 else k_len)
    inputs = inputs.replace(value=torch.full_like(inputs.value, top), gate=None)
    out = gated_attention(*inputs.tensors)
    assert ((out.double() / top) - 1).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denormal_inputs(device, dtype):
    tiny = torch.finfo(dtype).tiny
    inputs = draw(seed=8, dtype=dtype, device=device, lse=False)
    out = gated_attention(*inputs.replace(query=inputs.query * tiny / 4, gate=None, bias=None, mask=None).tensors)
    mean = inputs.value.mean(-2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=1e-5, atol=1e-6)


def test_denormal_arithmetic_of_the_caller_is_left_as_it_was():
    """Kernels may flush denormal results to zero while they run; threads of the pool work for others afterwards."""
    inputs = draw(seed=8, q=64, k=64, d=16, lse=False)
    evaluate(gated_attention_with_lse, inputs)
    small = torch.full((1 << 16,), 1e-30)  # enough for every thread of the pool
    assert (small * 1e-10 != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(device, dtype):
    """0, +-100 and +-inf; a closed gate gives exact zeros, forward and backward."""
    judge = Judge()
    inputs = draw(seed=9, dtype=dtype, device=device, q=20, k=33, d=8, lse=False)
    for i, logit in enumerate((0.0, 100.0, -100.0, math.inf, -math.inf)):
        inputs.gate[..., i::7, :] = logit
    inputs.gate[..., 6::7, ::2] = -math.inf
    results = judge.compare("gates", inputs)
    closed = inputs.gate == -math.inf
    assert (results["out"][closed] == 0).all()
    assert (results["d_gate"][inputs.gate.isinf()] == 0).all()
    assert (results["d_query"][..., 4::7, :] == 0).all()
    assert (results["d_bias"][..., 4::7, :] == 0).all()
    judge.verdict()


@pytest.mark.parametrize("name", ["query", "gate", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_row_stays_in_its_output_row(device, dtype, name):
    inputs = draw(seed=10, dtype=dtype, device=device, q=20, k=33, d=8, bias="full")
    inputs.mask[1, ..., 3] = True  # the bias that becomes NaN is attended
    clean = gated_attention(*inputs.tensors)
    getattr(inputs, name)[1, 0, 7, 3] = math.nan
    out = gated_attention(*inputs.tensors)
    if name == "gate":
        assert out[1, 0, 7, 3].isnan()
    else:
        assert out[1, 0, 7].isnan().all()
    out[1, 0, 7] = clean[1, 0, 7] = 0
    assert_identical({"out": out}, {"out": clean}, "other rows")


@pytest.mark.parametrize("infinity", [math.inf, math.nan])
def test_infinite_logits_make_their_row_nan(device, infinity):
    inputs = draw(seed=11, device=device, q=20, k=33, d=8, bias="full", mask=None)
    clean = gated_attention(*inputs.tensors)
    inputs.bias[0, 1, 5, 32] = infinity
    out = gated_attention(*inputs.tensors)
    assert out[0, 1, 5].isnan().all()
    out[0, 1, 5] = clean[0, 1, 5] = 0
    assert_identical({"out": out}, {"out": clean}, "other rows")


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_an_attended_key_stays_in_its_batch_entry_and_head_group(device, dtype, name):
    inputs = draw(seed=12, dtype=dtype, device=device, heads=4, kv_heads=2, q=20, k=33, d=8)
    inputs.mask[1, ..., 3] = True
    clean = evaluate(gated_attention_with_lse, inputs)
    poisoned = inputs.replace(**{name: getattr(inputs, name).clone()})
    getattr(poisoned, name)[1, 1, 3, 2] = math.nan
    results = evaluate(gated_attention_with_lse, poisoned)
    assert results["out"][1, 2:, :, 2].isnan().all()
    for key, result in results.items():
        grouped = 1 if key in ("d_key", "d_value") else 2
        result[1, grouped:] = clean[key][1, grouped:] = 0
    assert_identical(results, clean, "other head groups")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_an_incoming_gradient_stays_in_its_batch_entry_and_head_group(device, dtype):
    inputs = draw(seed=13, dtype=dtype, device=device, heads=4, kv_heads=2, q=20, k=33, d=8)
    clean = evaluate(gated_attention_with_lse, inputs)
    inputs.grad_out[1, 3, 4, 5] = math.nan
    results = evaluate(gated_attention_with_lse, inputs)
    assert results["d_value"][1, 1].isnan().any()
    assert results["d_query"][1, 3, 4].isnan().all()
    for key, result in results.items():
        grouped = 1 if key in ("d_key", "d_value") else 2
        result[1, grouped:] = clean[key][1, grouped:] = 0
    assert_identical(results, clean, "other head groups")


@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_sums_do_not_stop_growing(device, dtype):
    """A 16-bit accumulator would stop at 256 or 2048 equal terms: d_value is a sum of 4096 of them."""
    inputs = draw(seed=14, dtype=dtype, device=device, batch=(), heads=1, q=4096, k=2, d=4, gate=None, bias=None)
    inputs = inputs.replace(query=torch.zeros_like(inputs.query), mask=None, grad_lse=None)
    inputs = inputs.replace(grad_out=torch.ones_like(inputs.grad_out))
    results = evaluate(gated_attention_with_lse, inputs)
    assert (results["d_value"] == 2048).all()
