# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: streams, graphs, a second device, no synchronisation, sizes past 32 bits, compute-sanitizer,
and the same bits in every run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import assert_identical, draw, evaluate
from tolerance import Judge

from torch_gated_attn import _C, explain, gated_attention, gated_attention_with_lse

# A build without the kernels has one for the CUDA key too, which refuses.
RUNS = torch.cuda.is_available() and _C.cuda_version is not None
pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU and the CUDA kernels")


def rows_that_share_a_bias(seed: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16):
    return draw(seed=seed, dtype=dtype, device=device, batch=(6,), heads=2, q=130, k=150, d=32, bias=(1, 2, 130, 150))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_same_bits_in_every_run(dtype):
    inputs = rows_that_share_a_bias(1, dtype=dtype)
    first = evaluate(gated_attention_with_lse, inputs)
    for _ in range(49):
        assert_identical(first, evaluate(gated_attention_with_lse, inputs), "two runs")


def test_several_streams_at_once():
    calls = [rows_that_share_a_bias(seed) for seed in range(4)]
    expected = [evaluate(gated_attention_with_lse, inputs) for inputs in calls]
    torch.cuda.synchronize()
    results = []
    for inputs in calls:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(evaluate(gated_attention_with_lse, inputs))
    torch.cuda.synchronize()
    for a, b in zip(expected, results, strict=True):
        assert_identical(a, b, "streams side by side")


def test_forward_and_backward_in_a_graph():
    inputs = rows_that_share_a_bias(3)
    leaves = [t.detach().clone().requires_grad_() for t in inputs.tensors[:5]]

    def step():
        out = gated_attention(*leaves, inputs.mask)
        return out, *torch.autograd.grad(out, leaves, inputs.grad_out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (4, 5):
        changed = rows_that_share_a_bias(seed)
        with torch.no_grad():
            for leaf, tensor in zip(leaves, changed.tensors, strict=False):
                leaf.copy_(tensor)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_does_not_synchronise():
    inputs = rows_that_share_a_bias(6)
    evaluate(gated_attention_with_lse, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(gated_attention_with_lse, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device_while_the_first_is_current():
    first = evaluate(gated_attention_with_lse, rows_that_share_a_bias(7))
    second = evaluate(gated_attention_with_lse, rows_that_share_a_bias(7, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(result.device.index == 1 for result in second.values())
    assert_identical(first, {name: result.to("cuda:0") for name, result in second.items()}, "two devices")


def test_more_batch_rows_than_a_grid_dimension_holds():
    """A million: grids have 65535 blocks along y and z."""
    judge = Judge()
    for bias in (None, (1, 1, 2, 3)):
        inputs = draw(
            seed=8, dtype=torch.bfloat16, device="cuda", batch=(1_000_003,), heads=1, q=2, k=3, d=8, bias=bias, mask=None
        )
        judge.compare(f"bias={bias}", inputs)
    judge.verdict()


def needs_memory(gib):
    total = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 0
    return pytest.mark.skipif(total < gib * 2**30, reason=f"needs a GPU with {gib} GiB")


@needs_memory(48)
def test_tensors_of_more_than_2_to_the_31_elements():
    rows, shape = 70_000, (4, 60, 128)
    generator = torch.Generator("cuda").manual_seed(9)
    query, key, value, grad = (
        torch.randn(rows, *shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    assert query.numel() > 2**31
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out = gated_attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad)
    for part in (slice(0, 3), slice(rows - 3, rows)):  # no bias, so a row's bits do not depend on the others
        few = [t.detach()[part].clone().requires_grad_() for t in leaves]
        expected = gated_attention(*few)
        assert torch.equal(out[part], expected)
        for ours, alone in zip(gradients, torch.autograd.grad(expected, few, grad[part]), strict=True):
            assert torch.equal(ours[part], alone)


@needs_memory(24)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_past_2_to_the_31(dtype):
    """Rows that lie far apart in one buffer."""
    length, stride = 33, 2**26 + 8
    inputs = draw(seed=10, dtype=dtype, device="cuda", batch=(), heads=1, q=length, k=length, d=16, bias=None)
    buffer = torch.empty((length - 1) * stride + 16, dtype=dtype, device="cuda")
    assert buffer.numel() > 2**31
    judge = Judge()
    for name in ("query", "key", "value"):
        spread = buffer.as_strided((1, length, 16), (buffer.numel(), stride, 1))
        spread.copy_(getattr(inputs, name))
        judge.compare(name, inputs.replace(**{name: spread}))
    judge.verdict()


def test_what_no_fused_kernel_takes_warns_and_names_the_reason():
    inputs = draw(seed=11, dtype=torch.bfloat16, device="cuda", d=136)
    assert explain(*inputs.tensors).kernel == "composite"
    torch.set_warn_always(True)
    try:
        with pytest.warns(
            UserWarning, match="head_dim 136 is outside 1..128.*the composite formula runs, which stores all"
        ):
            Judge().compare("D=136", inputs)
    finally:
        torch.set_warn_always(False)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer of the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    # Every tensor an allocation of its own, so that an access past its end is one past an allocation.
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    only_ours = ["--kernel-name", "kernel_substring=torch_gated_attn"]
    calls = Path(__file__).with_name("tiny_calls.py").read_text()
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *only_ours, sys.executable, "-c", calls]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in run.stdout
