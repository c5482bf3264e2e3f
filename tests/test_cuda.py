# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: streams, graphs, a second device, no synchronisation, and the same bits in every run."""

from __future__ import annotations

import pytest
import torch
from inputs import assert_identical, draw, evaluate

from torch_gated_attn import gated_attention, gated_attention_with_lse

HAS_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("torch_gated_attn::_gated_attention_forward", "CUDA")
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and HAS_KERNELS), reason="needs a GPU and the CUDA kernels")


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
