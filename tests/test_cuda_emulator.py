# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels without a GPU: compiled for the host against an emulated device, which reports races, uninitialised
reads, accesses out of bounds or misaligned, deadlocks and bank conflicts. Any of them fails the call that caused it."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
import warnings

import pytest
import test_broadcast
import test_masks
import test_numerics
import test_special
import torch
from cuda_emulator import build, harness, low
from cuda_emulator.as_cpu import Operator, as_cpu_kernels
from cuda_emulator.bugs import BUGS
from inputs import assert_identical, draw, evaluate
from tolerance import Judge

from torch_gated_attn import explain, gated_attention_with_lse

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="the emulator needs g++ and switches stacks in x86-64 assembly",
)


@pytest.fixture
def emulated(library):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about what is done here on purpose: kernels are replaced
        with as_cpu_kernels(Operator(library)):
            yield


# Tests of the operator that run here unchanged, on tensors of the CPU and the CUDA kernels.
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MATRIX = [
    (test_numerics.test_query_and_key_lengths_on_the_diagonal, {"dtype": BF16}),
    (test_numerics.test_heads_and_batch_dimensions, {"dtype": BF16}),
    (test_numerics.test_float32_bias_with_other_inputs, {"dtype": BF16}),
    (test_numerics.test_float32_bias_with_other_inputs, {"dtype": FP16}),
    (test_numerics.test_without_a_gradient_of_lse, {"dtype": FP16}),
    (test_numerics.test_only_a_gradient_of_lse, {"dtype": BF16}),
    (test_broadcast.test_bias_over_every_subset, {"dtype": BF16}),
    (test_broadcast.test_bias_over_every_subset, {"dtype": FP32}),
    (test_broadcast.test_mask_over_every_subset, {"dtype": FP16}),
    (test_broadcast.test_gate_over_every_subset, {"dtype": BF16}),
    (test_broadcast.test_bias_mask_and_gate_together, {"step": 11}),  # 94 pairs
    (test_broadcast.test_gate_that_is_a_strided_half_of_a_projection, {}),
    *((test_masks.test_fully_masked_rows, {"dtype": t, "masked_rows": m}) for t in (BF16, FP32) for m in ("zero", "mean")),
    *((test_masks.test_fully_masked_rows_of_a_head_group, {"masked_rows": m}) for m in ("zero", "mean")),
    *((test_masks.test_bias_of_minus_infinity_excludes, {"dtype": t, "masked_rows": "mean"}) for t in (BF16, FP16)),
    *(
        (test_masks.test_masked_keys_and_values_leave_no_trace, {"dtype": BF16, "poison": p})
        for p in (torch.nan, torch.inf)
    ),
    (test_masks.test_masked_key_may_be_nan_where_values_are_averaged, {}),
    *((test_masks.test_additive_masks, {"dtype": t, "low": low}) for t in (BF16, FP32) for low in (-1e9, "finfo.min")),
    *((test_masks.test_rows_pushed_down_as_a_whole, {"dtype": BF16, "low": low}) for low in (-1e9, "finfo.min")),
    (test_masks.test_a_single_attended_key_is_copied, {}),
    *((test_special.test_scales, {"dtype": BF16, "scale": s}) for s in (1.0, 0.0, -0.7, 1e-30, 3.0)),
    (test_special.test_large_logits, {"dtype": FP32}),
    (test_special.test_products_beyond_float16, {}),
    (test_special.test_gates, {"dtype": BF16}),
    *(
        (test_special.test_nan_in_a_row_stays_in_its_output_row, {"dtype": BF16, "name": n})
        for n in ("query", "gate", "bias")
    ),
    (test_special.test_infinite_logits_make_their_row_nan, {"infinity": torch.inf}),
    (test_special.test_nan_in_an_attended_key_stays_in_its_batch_entry_and_head_group, {"dtype": BF16, "name": "key"}),
    (test_special.test_nan_in_an_incoming_gradient_stays_in_its_batch_entry_and_head_group, {"dtype": BF16}),
    (test_special.test_16_bit_sums_do_not_stop_growing, {"dtype": BF16}),
]


def name_of(value):
    if callable(value):
        return value.__name__.removeprefix("test_")
    return "-".join(str(v).removeprefix("torch.") for v in value.values())


@pytest.mark.parametrize(("function", "arguments"), MATRIX, ids=name_of)
def test_matrix_of_the_operator(emulated, function, arguments):
    function(device="cpu", **arguments)


def test_query_and_key_lengths(emulated):
    judge = Judge()
    for q in (1, 16, 33, 65, 129):
        for k in (1, 7, 32, 63, 130, 257):
            judge.compare(
                f"Q={q} K={k}", draw(seed=q + 1000 * k, dtype=BF16, batch=(3,), heads=1, q=q, k=k, d=8, bias=(1, q, k))
            )
    judge.verdict()


@pytest.mark.parametrize("bias_dtype", [BF16, FP32])
def test_bias_whose_rows_are_not_aligned(emulated, bias_dtype):
    """An odd number of keys, an odd offset, and batch dimensions between which the bias differs and does not."""
    judge = Judge()
    for k in (1, 7, 33, 77):
        for shape in ((2, 1, 3, 2, 21, k), (1, 3, 1, 1, 21, k), (21, k), (2, 21, k)):
            inputs = draw(
                seed=k, dtype=BF16, batch=(2, 3, 3), q=21, k=k, bias=shape, bias_dtype=bias_dtype, mask=(2, 1, 1, 1, 1, k)
            )
            judge.compare(f"{shape}", inputs)
    inputs = draw(seed=1, dtype=BF16, batch=(3,), q=21, k=36, bias=(2, 21, 40), bias_dtype=bias_dtype)
    judge.compare("offset", inputs.replace(bias=inputs.bias[..., 3:39]))
    judge.verdict()


def test_head_dims(emulated):
    judge = Judge()
    for d in (*range(1, 18), 24, 31, 32, 33, 40, 48, 59, 64, 72, 96, 111, 128):
        for dv in (d, 7 * d % 41 + 1):
            dtype = FP16 if max(d, dv) <= 48 and d % 2 else BF16
            judge.compare(f"D={d} Dv={dv}", draw(seed=d, dtype=dtype, q=19, k=37, d=d, dv=dv))
    judge.verdict()


def test_head_dims_in_float32(emulated):
    judge = Judge()
    for d in (1, 4, 8, 12, 16, 20, 24, 32, 36, 44, 48, 52, 60, 64, 68, 128):
        for dv in (d, 12):
            judge.compare(f"D={d} Dv={dv}", draw(seed=d, dtype=FP32, q=19, k=37, d=d, dv=dv))
    judge.verdict()


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_architectures_differ_in_shared_memory_only(library, arch):
    """With little of it dBias takes another kernel."""
    operator = Operator(library, arch=arch)
    judge = Judge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with as_cpu_kernels(operator):
            for k in (96, 450):
                for dtype, bias_dtype in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
                    inputs = draw(
                        seed=k, dtype=dtype, batch=(2, 9), q=40, k=k, d=32, bias=(2, 1, 2, 40, k), bias_dtype=bias_dtype
                    )
                    judge.compare(f"sm_{arch} K={k}", inputs)
    judge.verdict()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("masked_rows", ["zero", "mean"])
def test_logits_up_to_50(emulated, dtype, masked_rows):
    inputs = draw(seed=3, dtype=dtype, batch=(4,), q=64, k=96, d=32, bias=(1, 2, 64, 96), masked_rows=masked_rows)
    inputs = inputs.replace(bias=inputs.bias * 12, query=inputs.query * 4)
    inputs.mask[1] = False  # rows without a key
    logits = inputs.query.double() @ inputs.key.double().mT * 32**-0.5 + inputs.bias.double()
    assert 50 < logits.abs().max() < 60
    judge = Judge()
    judge.compare("scaled", inputs)
    judge.verdict()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_same_bits_for_every_order_of_the_warps(library, dtype):
    inputs = draw(seed=5, dtype=dtype, batch=(7,), heads=2, q=70, k=130, d=16, bias=(1, 2, 70, 130))
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(1, 5):
            with as_cpu_kernels(Operator(library, seed=seed)):
                results.append(evaluate(gated_attention_with_lse, inputs))
    for other in results[1:]:
        assert_identical(results[0], other, "two schedules")


def test_exponentials_per_score(library):
    """One in the forward, two in the backward, and a few per row."""
    rows, heads, n, d = 4, 1, 128, 32
    inputs = draw(seed=1, dtype=BF16, batch=(rows,), heads=heads, q=n, k=n, d=d, bias=(heads, n, n), mask=None, gate=None)
    scores, per_row = rows * heads * n * n, 64 * rows * heads * n
    saved = harness.forward(library, *inputs.tensors)
    assert scores <= library.emulator_report().contents.exp2 <= scores + per_row
    harness.backward(library, saved, inputs.grad_out, inputs.grad_lse, *inputs.tensors)
    assert 2 * scores <= library.emulator_report().contents.exp2 <= 2 * scores + per_row


EXPLAINED = [
    ({}, "the tensor-core kernel with a bias per batch row"),
    ({"bias": (1, 2, 16, 24)}, "the tensor-core kernel that shares the bias between batch rows"),
    ({"bias": None}, "the tensor-core kernel without bias"),
    ({"d": 12}, "the general tensor-core kernel: head_dim is not a multiple of 8"),
    ({"mask": "full"}, "the tensor-core kernel with a bias per batch row"),
    ({"bias": (1, 2, 16, 24), "mask": "full"}, "the tensor-core kernel that shares the bias between batch rows"),
    ({"bias": None, "is_causal": True, "window": 5}, "the tensor-core kernel without bias"),
    ({"is_causal": True, "d": 12}, "the general tensor-core kernel: head_dim is not a multiple of 8"),
    ({"key_lengths": [3, 0, 24, 9], "mask": "full"}, "the tensor-core kernel with a bias per batch row"),
    ({"key_lengths": [3, 0, 24, 9], "dtype": FP32}, "the float32 tensor-core kernel (three TF32 products) with bias"),
    ({"dtype": FP32, "bias": None, "d": 12}, "the float32 tensor-core kernel (three TF32 products) without bias"),
    ({"dtype": FP32, "k": 23}, "three TF32 products) with bias, on a copy of the bias whose rows are aligned"),
    ({"dtype": FP32, "scale": 0.0}, "the float32 tensor-core kernel (three TF32 products) with bias"),
    ({"scale": 0.0}, "the general tensor-core kernel: the scale is zero or out of the range"),
    ({"dtype": FP32, "d": 14}, "the plain kernel, in float32 multiply-adds: head_dim is not a multiple of 4"),
    (
        {"dtype": FP32, "d": 72},
        "float32 multiply-adds: head_dim is above 64, where the tensor-core kernels for float32 end",
    ),
    ({"dtype": FP64}, "float64 takes the plain kernel"),
    ({"d": 136}, "head_dim 136 is outside 1..128"),
]


@pytest.mark.parametrize(("changes", "reason"), EXPLAINED, ids=lambda x: str(x)[:40])
def test_choice_of_kernel(library, changes, reason):
    inputs = draw(**{"seed": 1, "dtype": BF16, "batch": (4,), "q": 16, "k": 24, "d": 16, **changes})
    call = harness.Call(library, *inputs.tensors, **inputs.options)
    chosen = library.emulator_explain(harness.ctypes.byref(call.problem), 90, 0).decode()
    assert reason in chosen
    assert explain(*inputs.tensors, **inputs.options, device="sm_90").reason.startswith(chosen)


def test_old_architecture_is_refused(library):
    call = harness.Call(library, *draw(seed=1, dtype=BF16).tensors)
    reason = library.emulator_explain(harness.ctypes.byref(call.problem), 75, 0).decode()
    assert "compute capability 7.5 is below 8.0" in reason
    call = harness.Call(library, *draw(seed=1, dtype=FP32).tensors)
    reason = library.emulator_explain(harness.ctypes.byref(call.problem), 75, 0).decode()
    assert reason.startswith("the plain kernel, in float32 multiply-adds")


def library_of_a_bug(root, dtype):
    """Of the few kernels that its call runs."""
    return harness.load(build.build(root, only=("bias_workspace",), instead=[build.HERE / f"planted_{dtype}.cpp"]))


def judge_bug(library, bug):
    sizes = {"batch": (5,), "heads": 1, "q": 70, "k": 150, "d": 16, "bias": (1, 70, 150), "scale": 0.3}
    one_pair = bug.changes.get("mask") == "one pair"
    mask = None if one_pair or not bug.masked else "key"
    dtype = {"bf16": BF16, "fp32": FP32}[bug.dtype]
    inputs = draw(seed=3, dtype=dtype, **{**sizes, "mask": mask, **({} if one_pair else bug.changes)})
    if one_pair:  # in the last tile of either kernel's
        inputs = inputs.replace(mask=torch.zeros(70, 150, dtype=torch.bool))
        inputs.mask[66:, 140] = inputs.mask[:60, :50] = True
        inputs.mask[67:, 140] = False
    if not bug.changes:  # whose hidden keys are to count
        inputs = inputs.replace(bias=inputs.bias + torch.linspace(0, 60, 150).to(dtype))  # the largest logits come last

    judge = Judge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with as_cpu_kernels(Operator(library)):
            if bug.low:
                low.compare(judge, bug.name, low.make(inputs, slice(3, 40), None, -1e30))
            else:
                judge.compare(bug.name, inputs)
    judge.verdict()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(tmp_path, bug):
    library = library_of_a_bug(bug.plant(tmp_path), bug.dtype)
    with pytest.raises((harness.Finding, AssertionError)):
        judge_bug(library, bug)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_without_a_bug_nothing_is_caught(dtype):
    library = library_of_a_bug(build.CUDA, dtype)
    calls = {(bug.masked, bug.low, str(bug.changes)): bug for bug in BUGS}
    for bug in calls.values():
        judge_bug(library, dataclasses.replace(bug, dtype=dtype))


def test_address_and_undefined_behaviour_sanitizers():
    program = build.build(
        only=("bf16_16", "fp32_16", "bias_workspace", "plain_float"), flags=("-O0", *build.SANITIZE), program=True
    )
    run = subprocess.run([program], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 calls, no findings" in run.stdout
