# SPDX-License-Identifier: BSD-3-Clause
"""Tensors of more than 2^31 elements, offsets beyond it, the memory a call takes, and what happens where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import DIFFERENTIABLE, DTYPES, assert_identical, draw, evaluate
from mapped import spread
from torch import Tensor

from torch_gated_attn import gated_attention_with_lse

FAR = 2**31 + 24  # elements; a 32-bit offset, signed or not multiplied by an element's size, does not reach it
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mmap and /proc")


@pytest.mark.parametrize("q_len", [1, 5])
def test_keys_and_values_of_more_than_2_31_elements(q_len):
    """One row, expanded over 2^20 keys of which four are attended; a few queries have kernels of their own."""
    k_len, d = 2**20, 2056
    small = draw(seed=1, q=q_len, k=4, d=d, batch=(), heads=1, bias=None, mask=None)
    small = small.replace(
        key=small.key[..., :1, :].expand_as(small.key), value=small.value[..., :1, :].expand_as(small.value)
    )
    mask = torch.zeros(k_len, dtype=torch.bool)
    mask[[0, 17, 2**19, k_len - 1]] = True
    rows = {name: getattr(small, name)[..., :1, :].expand(1, k_len, d) for name in ("key", "value")}
    large = small.replace(mask=mask, **rows)
    assert min(large.key.numel(), large.value.numel()) > 2**31
    wrt = ("query", "gate")
    expected, results = (evaluate(gated_attention_with_lse, call, wrt) for call in (small, large))
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_query_of_more_than_2_31_elements():
    q_len, d = 2**20 + 1, 2056
    small = draw(seed=2, q=1, k=3, d=d, dv=1, batch=(), heads=1, bias=None, mask=None, gate=None)
    large = small.query.expand(1, q_len, d)
    assert large.numel() > 2**31
    out, lse = gated_attention_with_lse(large, small.key, small.value)
    expected, expected_lse = gated_attention_with_lse(small.query, small.key, small.value)
    torch.testing.assert_close(out, expected.expand_as(out), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse.expand_as(lse), rtol=1e-5, atol=1e-5)


def test_bias_and_mask_of_more_than_2_31_elements():
    heads, k_len = 2**11 + 1, 2**20
    small = draw(seed=3, q=1, k=1, d=4, batch=(), heads=1, bias=(1, 1, 1), mask=None, gate=None)
    query, key, value = (getattr(small, name) for name in ("query", "key", "value"))
    mask = torch.zeros(k_len, dtype=torch.bool)
    mask[-2:] = True
    bias = small.bias.expand(heads, 1, k_len)
    mask = mask.expand(heads, 1, k_len)
    assert min(bias.numel(), mask.numel()) > 2**31
    out, lse = gated_attention_with_lse(
        query.expand(heads, 1, 4), key.expand(heads, k_len, 4), value.expand(heads, k_len, 4), None, bias, mask
    )
    torch.testing.assert_close(out, value.expand(heads, 1, 4), rtol=1e-6, atol=1e-6)
    _, expected = gated_attention_with_lse(query, key, value, None, small.bias)
    torch.testing.assert_close(lse, (expected + 2**0.5).expand(heads, 1) - 2**0.5 + torch.log(torch.tensor(2.0)))


def far_apart(x: Tensor, dim: int) -> Tensor:
    """The same values, with the entries of one dimension FAR elements apart."""
    strides = list(x.stride())
    strides[dim] = FAR
    return spread(x, strides)


@LINUX
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [2, 7])
def test_offsets_beyond_2_31(dtype, q_len):
    """Every input in turn, with batch entries, heads or rows further apart than 32 bits count."""
    inputs = draw(seed=4, dtype=dtype, batch=(3,), heads=2, q=q_len, k=6, d=8, dv=12, mask="full")
    expected = evaluate(gated_attention_with_lse, inputs)
    for name in (*DIFFERENTIABLE, "mask", "grad_out", "grad_lse"):
        x = getattr(inputs, name)
        for dim in range(min(3, x.dim())):
            changed = inputs.replace(**{name: far_apart(x, dim)})
            assert_identical(expected, evaluate(gated_attention_with_lse, changed), f"{name} far apart in dimension {dim}")


PEAK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from inputs import draw, evaluate
from torch_gated_attn import gated_attention_with_lse
torch.set_num_threads(1)

def resident(line):
    status = open("/proc/self/status").read()
    return int(next(l for l in status.splitlines() if l.startswith(line)).split()[1]) / 1024

evaluate(gated_attention_with_lse, draw(seed=1, **{{**{sizes!r}, "batch": (1,), "q": 40, "k": 40, "bias": None}}))
inputs = draw(seed=1, **{sizes!r})
open("/proc/self/clear_refs", "w").write("5")  # the peak is what is resident now, see proc(5)
before = resident("VmRSS")
results = evaluate(gated_attention_with_lse, inputs)
print(resident("VmHWM") - before, sum(x.nbytes for x in results.values()) / 2**20)
"""


@LINUX
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": (1,), "heads": 8, "q": 2048, "k": 2048, "d": 16, "bias": None},
        {"batch": (32,), "heads": 4, "q": 512, "k": 512, "d": 16, "bias": (1, 4, 512, 512)},
    ],
    ids=["no bias", "bias shared by 32 rows"],
)
def test_peak_memory(sizes):
    """Forward and backward take their results, two numbers per row and a few MiB: never queries x keys of every entry.

    128 MiB of scores and an expanded bias of as much are what is not there.
    """
    assert sizes["batch"][0] * sizes["heads"] * sizes["q"] * sizes["k"] * 4 == 128 * 2**20
    program = PEAK.format(tests=str(Path(__file__).parent), sizes=sizes)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    growth, needed = map(float, run.stdout.split())
    # row_max and row_sum, a partial sum per group of rows, scratch, and the allocator's and the test's own rounding.
    assert growth <= 2 * needed + 16, f"{growth:.0f} MiB for results of {needed:.0f} MiB"


STARVED = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from inputs import assert_identical, draw, evaluate
from torch_gated_attn import gated_attention_with_lse
torch.set_num_threads(2)
inputs = draw(seed=1, batch=(6,), heads=3, q=200, k=300, d=64, bias=(1, 3, 200, 300))
expected = evaluate(gated_attention_with_lse, inputs)  # also starts the threads
small = draw(seed=2)
expected_small = evaluate(gated_attention_with_lse, small)

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

failed = calls = 0
for headroom in range(0, 24 << 20, 400 << 10):
    calls += 1
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + headroom, resource.RLIM_INFINITY))
    try:
        results = evaluate(gated_attention_with_lse, inputs)
    except (RuntimeError, MemoryError):
        results = None
        failed += 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if results is not None:
        assert_identical(expected, results, headroom)
        results = None
    assert_identical(expected_small, evaluate(gated_attention_with_lse, small), headroom)
assert_identical(expected, evaluate(gated_attention_with_lse, inputs), "the end")
print(failed, calls)
"""


@LINUX
def test_failed_allocations():
    """An allocation that fails, whichever of a call, is an exception, and the next call is right."""
    program = STARVED.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}  # nothing is kept
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr
    failed, calls = map(int, run.stdout.split())
    assert 0 < failed < calls, f"{failed} of {calls} calls failed: the limits miss the allocations"
