# SPDX-License-Identifier: BSD-3-Clause
"""Every promise on every CUDA kernel, in the emulator of test_cuda_emulator.py.

A table of kernels by promises: each test is a column. It makes calls that together launch every kernel that is compiled
in, whatever it is called, and fails where one of them was not: an empty cell. A kernel is a variant here; types and
head_dims take turns.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from cuda_emulator import harness, kernels, low
from cuda_emulator.as_cpu import Operator, as_cpu_kernels
from inputs import Inputs, assert_identical, draw, evaluate
from tolerance import Judge

from torch_gated_attn import gated_attention_with_lse

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Q, K = 72, 76  # a tile and a piece of one, for every kernel


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to make the operator choose certain kernels."""

    name: str
    dtypes: tuple[torch.dtype, ...] = (BF16, FP16)
    bias: str | None = "own"
    float_bias: bool = False
    shared_bytes: int = 0  # of the device: too few leave no room for a strip of dBias
    keys: int = 0  # more than asked for
    changes: tuple = ()

    def draw(self, dtype: torch.dtype, seed: int = 0, **changes) -> Inputs:
        sizes = {"batch": (3,), "heads": 2, "q": Q, "k": K, "d": 8, **dict(self.changes), **changes}
        sizes["k"] += self.keys
        rows = () if self.bias == "own" else (1,)
        shape = (*(sizes["batch"] if self.bias == "own" else rows), sizes["heads"], sizes["q"], sizes["k"])
        return draw(
            seed=seed,
            dtype=dtype,
            **{"bias": shape if self.bias else None, "bias_dtype": FP32 if self.float_bias else dtype, **sizes},
        )


WAYS = [
    Way("no bias", bias=None),
    Way("own bias"),
    Way("own float32 bias", float_bias=True),
    Way("shared bias", bias="shared"),
    Way("shared float32 bias", bias="shared", float_bias=True),
    Way("shared bias without a strip", bias="shared", shared_bytes=1024),
    Way("shared float32 bias without a strip", bias="shared", float_bias=True, shared_bytes=1024),
    Way("odd number of keys", keys=1),
    Way("odd number of keys, float32 bias", bias="shared", float_bias=True, keys=1),
    Way("odd number of keys without a strip", bias="shared", float_bias=True, keys=1, shared_bytes=1024),
    Way("large scale", changes=(("scale", 1.5),)),
    Way("mask that differs between queries", bias="shared", changes=(("mask", "full"),)),
    Way("float32, no bias", dtypes=(FP32, FP32), bias=None),
    Way("float32, own bias", dtypes=(FP32, FP32)),
    Way("float32, shared bias", dtypes=(FP32, FP32), bias="shared"),
    Way("float32, shared bias without a strip", dtypes=(FP32, FP32), bias="shared", shared_bytes=1024),
    Way("float32, odd number of keys", dtypes=(FP32, FP32), bias="shared", keys=1, changes=(("scale", 1.5),)),
    Way("plain", dtypes=(FP32, FP64), changes=(("d", 6),)),
]


@pytest.fixture
def compiled(library):
    return {kernel.variant for kernel in kernels.of_library(library._name)}


@pytest.fixture
def column(library, compiled):
    """column(calls) runs calls(way, dtype) for every way, and fails where a kernel never ran."""

    def run(calls, every_dtype: bool = False, without: tuple[str, ...] = ()) -> None:
        harness.LAUNCHED.clear()
        for i, way in enumerate(WAYS):
            for dtype in way.dtypes if every_dtype else (way.dtypes[i % 2],):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with as_cpu_kernels(Operator(library, shared_bytes=way.shared_bytes)):
                        calls(way, dtype)
        missing = compiled - {kernel.variant for kernel in harness.LAUNCHED}
        assert missing == {variant for variant in compiled if variant in without}, f"not tried on: {sorted(missing)}"

    return run


# Kernels that a column cannot reach: they only run where there is no bias.
NO_BIAS = tuple(
    f"{kernel}, {dtype}no bias" for kernel in ("forward", "backward query", "backward key") for dtype in ("", "tf32, ")
)


@pytest.mark.parametrize("place", ["rows", "keys", "rows and keys", "all"])
def test_low_logits(column, place):
    """Finite logits take part however low they are, and rows of them are as accurate as any."""
    rows = {"rows": slice(3, 9), "rows and keys": slice(64, None), "all": slice(None)}.get(place)
    keys = slice(10, None, 3) if "keys" in place else None

    def calls(way, dtype):
        if way.bias is None:
            return
        judge = Judge()
        bias_dtype = FP32 if way.float_bias else dtype
        for i, value in enumerate((-1e3, -1e5, -1e6, -1e9, -1e30, torch.finfo(bias_dtype).min)):
            if value >= torch.finfo(bias_dtype).min:
                inputs = way.draw(dtype, seed=i, heads=1)
                low.compare(judge, f"{way.name} {dtype} {value:g}", low.make(inputs, rows, keys, value))
        judge.verdict()

    column(calls, every_dtype=place == "rows", without=NO_BIAS)


def test_low_products(column):
    """Rows pushed down by the product of query and key alone."""

    def calls(way, dtype):
        judge = Judge()
        judge.few_elements = math.inf  # equal probabilities have equal rounding errors, whose rms is luck
        for value in (-64.0, -512.0):
            inputs = way.draw(dtype, heads=1)
            inputs.query[..., 3:9, :] = 0
            inputs.query[..., 3:9, 0] = 512
            inputs.key[..., 0] = value
            inputs.query[..., 9:, 0] = 0
            judge.compare(f"{way.name} {dtype} {value:g}", inputs)
        judge.verdict()

    column(calls)


@pytest.mark.parametrize("masked_rows", ["zero", "mean"])
def test_rows_without_a_key(column, masked_rows):
    def calls(way, dtype):
        inputs = way.draw(dtype, masked_rows=masked_rows)
        inputs.mask[1] = False
        dead = ~inputs.mask.any(-1).expand(inputs.query.shape[:-1])
        if inputs.bias is not None:
            inputs.bias[..., 5, :] = -math.inf
            dead = dead | torch.arange(Q).eq(5)
        judge = Judge()
        results = judge.compare(f"{way.name} {dtype}", inputs)
        assert dead.any()
        assert (results["lse"][dead] == -math.inf).all()
        assert (results["d_query"][dead] == 0).all()
        if masked_rows == "zero":
            assert (results["out"][dead] == 0).all()
        judge.verdict()

    column(calls)


def test_masked_keys_leave_no_trace(column):
    def calls(way, dtype):
        clean = way.draw(dtype, mask="key")
        clean.mask[1] = False
        masked = ~clean.mask.mT
        poisoned = clean.replace(
            key=clean.key.masked_fill(masked, math.nan), value=clean.value.masked_fill(masked, math.inf)
        )
        if clean.bias is not None and way.bias == "own":
            poisoned = poisoned.replace(bias=clean.bias.masked_fill(~clean.mask, math.nan))
        a, b = (evaluate(gated_attention_with_lse, inputs) for inputs in (clean, poisoned))
        assert_identical(a, b, f"{way.name} {dtype}")

    column(calls)


def test_bands_of_minus_infinity_and_of_the_lowest_number(column):
    def calls(way, dtype):
        if way.bias is None:
            return
        judge = Judge()
        for seed in range(2):
            inputs = way.draw(dtype, seed=seed)
            case = low.make(inputs, slice(40, 50), slice(5, 12), torch.finfo(inputs.bias.dtype).min)
            band = torch.arange(Q)[:, None] - torch.arange(inputs.bias.size(-1)) > 30
            case.inputs.bias[..., band] = -math.inf
            case.inputs.bias[..., 2, :] = -math.inf
            case.inputs.bias[..., 45, :] = -math.inf
            low.compare(judge, f"{way.name} {dtype}", case)
        judge.verdict()

    column(calls, without=NO_BIAS)


def test_head_dims_and_lengths(column):
    def calls(way, dtype):
        judge = Judge()
        for d, dv in ((8, 16), (16, 8)) if way.name not in ("large scale", "plain") else ((5, 9), (16, 1)):
            for q, k in ((1, 2), (17, 66), (65, 34)):
                inputs = way.draw(dtype, seed=q, heads=1, d=d, dv=dv, q=q, k=k)
                judge.compare(f"{way.name} {dtype} {d} {dv} {q} {k}", inputs)
        judge.verdict()

    column(calls)


def test_gates(column):
    def calls(way, dtype):
        judge = Judge()
        for gate in (None, "head", (2, 1, 1), (3, 1, 33, dict(way.changes).get("d", 8)), ()):
            judge.compare(f"{way.name} {dtype} {gate}", way.draw(dtype, gate=gate, q=33, k=34))
        inputs = way.draw(dtype, q=33, k=34)
        inputs.gate[..., ::3, :] = -math.inf
        judge.compare(f"{way.name} {dtype} closed", inputs)
        judge.verdict()

    column(calls)


def test_grouped_heads(column):
    def calls(way, dtype):
        judge = Judge()
        for kv_heads in (1, 2):
            judge.compare(f"{way.name} {dtype} {kv_heads}", way.draw(dtype, heads=4, kv_heads=kv_heads, q=33))
        judge.verdict()

    column(calls)


def test_scales(column):
    def calls(way, dtype):
        judge = Judge()
        general = (1.5,) if way.name == "large scale" else ()  # which makes a call take the general kernels
        for scale in (-0.3, 0.01, 2.0**-30, *general):
            judge.compare(f"{way.name} {dtype} {scale}", way.draw(dtype, scale=scale, q=33))
        judge.verdict()

    column(calls)


def test_gradients_of_one_result_only(column):
    def calls(way, dtype):
        judge = Judge()
        inputs = way.draw(dtype, q=33)
        judge.compare(f"{way.name} {dtype} out", inputs.replace(grad_lse=None))
        judge.compare(f"{way.name} {dtype} lse", inputs.replace(grad_out=torch.zeros_like(inputs.grad_out)))
        judge.verdict()

    column(calls)


def test_nan_and_infinity_stay_in_their_row(column):
    def calls(way, dtype):
        clean = way.draw(dtype, mask=None if way.name != "mask that differs between queries" else "full")
        if clean.mask is not None:
            clean.mask[..., 7, :] = True
        for name, value in (("query", math.nan), ("bias", math.nan), ("bias", math.inf)):
            if getattr(clean, name) is None:
                continue
            inputs = clean.replace(**{name: getattr(clean, name).clone()})
            getattr(inputs, name)[..., 7, 3] = value
            a, b = (evaluate(gated_attention_with_lse, x) for x in (clean, inputs))
            assert b["out"][..., 7, :].isnan().all(), (way.name, name, value)
            a["out"][..., 7, :] = b["out"][..., 7, :] = 0
            assert_identical({"out": a["out"]}, {"out": b["out"]}, f"{way.name} {name} {value}")

    column(calls)


def test_same_bits_for_two_schedules(library, column):
    def calls(way, dtype):
        inputs = way.draw(dtype)
        first = evaluate(gated_attention_with_lse, inputs)
        with as_cpu_kernels(Operator(library, seed=7, shared_bytes=way.shared_bytes)):
            assert_identical(first, evaluate(gated_attention_with_lse, inputs), f"{way.name} {dtype}")

    column(calls)


EDGES = [
    {"is_causal": True},
    {"is_causal": True, "q": 33, "k": 76},
    {"is_causal": True, "q": 76, "k": 34},
    {"is_causal": True, "window": 1, "masked_rows": "mean", "q": 76, "k": 34},
    {"is_causal": True, "window": 33, "key_lengths": [76, 40, 33]},
    {"key_lengths": [1, 75, 76], "mask": None},
    {"key_lengths": [0, 76, 64], "masked_rows": "mean"},
]


@pytest.mark.parametrize("positions", EDGES, ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()))
def test_positions_and_lengths(column, positions):
    def calls(way, dtype):
        judge = Judge()
        judge.compare(f"{way.name} {dtype}", way.draw(dtype, **{"heads": 1, **positions}))
        judge.verdict()

    column(calls)


def test_masks_that_differ_between_queries(column):
    """Random ones, and blocks with one pair elsewhere: d_bias of hidden pairs is exactly 0."""

    def calls(way, dtype):
        judge = Judge()
        judge.compare(f"{way.name} {dtype} random", way.draw(dtype, heads=1, mask="full", is_causal=True))
        inputs = way.draw(dtype, kv_heads=1, masked_rows="mean")
        k = inputs.key.size(-2)
        mask = torch.zeros(2, Q, k, dtype=torch.bool)
        mask[0, 8:40, 3:30] = mask[1, :64, 64:] = mask[0, 71, 70] = True
        results = judge.compare(f"{way.name} {dtype} blocks", inputs.replace(mask=mask))
        if inputs.bias is not None:
            hidden = ~mask.expand(results["d_bias"].shape)
            assert (results["d_bias"][hidden] == 0).all(), way.name
        judge.verdict()

    column(calls)


def test_keys_that_no_query_sees_leave_no_trace(column):
    """NaN beyond the lengths, before the window of the first query, and where a mask hides a key from all queries."""

    def calls(way, dtype):
        clean = way.draw(dtype, heads=1, q=33, is_causal=True, window=9, key_lengths=[70, 50, 76], mask=None)
        k = clean.key.size(-2)
        key = torch.arange(k)
        hidden = (key >= clean.key_lengths[:, None]) | (key <= k - 33 - 9)
        clean = clean.replace(mask=torch.rand(33, k) < 0.7)
        clean.mask[:, 60] = False
        hidden[:, 60] = True
        hidden = hidden[:, None, :, None]
        poisoned = clean.replace(
            key=clean.key.masked_fill(hidden, math.nan), value=clean.value.masked_fill(hidden, math.nan)
        )
        a, b = (evaluate(gated_attention_with_lse, inputs) for inputs in (clean, poisoned))
        assert_identical(a, b, f"{way.name} {dtype}")

    column(calls)
