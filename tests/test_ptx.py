# SPDX-License-Identifier: BSD-3-Clause
"""The PTX that nvcc makes of the CUDA kernels, run by the interpreter of tests/ptx: a second opinion on the emulator, which
compiles their source by another compiler. A race, an uninitialised, misaligned or stray access ends the call that did it.

Every kernel of head_dim 16 and 32 for both 16-bit types and the plain ones of float32, for two architectures, forward and
backward, against float64.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings

import pytest
import torch
from cuda_emulator import harness, low
from cuda_emulator.as_cpu import Operator, as_cpu_kernels
from cuda_emulator.kernels import Kernel
from inputs import Inputs, draw
from ptx.counts import executed
from ptx.faults import Finding
from ptx.mutations import MUTATIONS
from test_cuda_promises import WAYS, Way
from tolerance import Judge

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF_WAYS, PLAIN = [way for way in WAYS if FP32 not in way.dtypes], next(way for way in WAYS if FP32 in way.dtypes)
KINDS = [(dtype, head_dim) for dtype in (BF16, FP16) for head_dim in (16, 32)]
INSTANTIATIONS = ("f16_16.cu", "f16_32.cu", "fp16_16.cu", "fp16_32.cu", "bias_workspace.cu", "plain_float.cu")
NEEDED = ("nvcc", "g++", "c++filt")

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in NEEDED),
    reason=f"the PTX comes from a CUDA toolkit: needs {', '.join(NEEDED)}",
)


@pytest.fixture(scope="module")
def ptx():
    from ptx import build, library

    return library.Library(*build.build(INSTANTIATIONS))


@contextlib.contextmanager
def interpreted(ptx, way: Way, arch: int = 90):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about what is done here on purpose: kernels are replaced
        with as_cpu_kernels(Operator(ptx, arch=arch, shared_bytes=way.shared_bytes)):
            yield


def with_dead_rows(inputs: Inputs) -> Inputs:
    inputs.mask[1] = False
    if inputs.bias is not None:
        inputs.bias[..., 5, :] = -math.inf
    return inputs


def name(kind: tuple[torch.dtype, int]) -> str:
    return f"{kind[0]}-{kind[1]}".removeprefix("torch.")


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_every_kernel(ptx, kind):
    """Tails of queries and keys, masked keys, rows without a key; each kernel that is compiled has run afterwards."""
    dtype, head_dim = kind
    judge = Judge()
    harness.LAUNCHED.clear()
    for i, way in enumerate(HALF_WAYS):
        with interpreted(ptx, way):
            inputs = way.draw(dtype, heads=1, d=head_dim, masked_rows="mean" if i % 2 else "zero")
            judge.compare(f"{way.name} {name(kind)}", with_dead_rows(inputs))
    judge.verdict()
    short = {BF16: "bf16", FP16: "fp16"}[dtype]
    compiled = {k for k in ptx.variants(90) if k.dtype == short and k.head_dim in (0, head_dim)}
    assert len(compiled) > 20
    assert compiled <= harness.LAUNCHED, sorted(compiled - harness.LAUNCHED)


def test_architectures_differ_in_shared_memory_only(ptx):
    """So what runs for one runs for the other; the strip of dBias for 450 keys fits one of them."""
    for mangled, kernel in ptx.kernels[80].items():
        assert kernel.body == ptx.kernels[90][mangled].body, "run test_every_kernel for sm_80 as well"
    way, launched = next(w for w in WAYS if w.name == "shared bias"), []
    for arch in (80, 90):
        judge = Judge()
        harness.LAUNCHED.clear()
        with interpreted(ptx, way, arch):
            judge.compare(f"sm_{arch}", way.draw(BF16, heads=1, q=40, k=450, d=32))
        judge.verdict()
        launched.append({kernel.variant for kernel in harness.LAUNCHED})
    assert launched[0] ^ launched[1] == {
        "backward query, half bias, strip",
        "backward query, half bias",
        "backward bias, half bias",
    }


@pytest.mark.parametrize("value", [-1e5, -1e9, -1e30])
def test_low_logits(ptx, value):
    """Rows of low logits are as accurate as any."""
    judge = Judge()
    for i, way in enumerate((*HALF_WAYS, PLAIN)):
        dtype, head_dim = (FP32, 8) if way is PLAIN else KINDS[i % 4]
        if way.bias and value >= torch.finfo(FP32 if way.float_bias else dtype).min:
            with interpreted(ptx, way):
                inputs = way.draw(dtype, seed=i, heads=1, d=head_dim)
                low.compare(judge, f"{way.name} {dtype} {value:g}", low.make(inputs, slice(3, 9), None, value))
    judge.verdict()


POSITIONS = {
    "causal": {"is_causal": True, "mask": None},
    "fewer keys than queries": {"is_causal": True, "q": 76, "k": 33, "masked_rows": "mean"},
    "window and lengths": {"is_causal": True, "window": 33, "key_lengths": [76, 0, 41]},
    "a mask of pairs": {"mask": "full", "is_causal": True},
}


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_and_masks(ptx, positions):
    judge = Judge()
    for i, way in enumerate((*HALF_WAYS, PLAIN)):
        dtype, head_dim = (FP32, 8) if way is PLAIN else KINDS[(i + 1) % 4]
        with interpreted(ptx, way):
            judge.compare(f"{way.name} {dtype}", way.draw(dtype, heads=1, d=head_dim, **POSITIONS[positions]))
    judge.verdict()


def test_plain_kernels(ptx):
    judge = Judge()
    with interpreted(ptx, PLAIN):
        for k, d, dv, masked_rows in ((37, 16, 9, "zero"), (18, 32, 32, "mean")):
            inputs = PLAIN.draw(FP32, heads=1, q=20, k=k, d=d, dv=dv, masked_rows=masked_rows)
            judge.compare(f"{k} {d} {dv}", with_dead_rows(inputs))
    judge.verdict()


def seen(ptx, mutation=None) -> None:
    """A call with full tiles and mixed ones."""
    way = next(w for w in WAYS if w.name == "shared bias")
    inputs = way.draw(BF16, seed=3, heads=1, k=150, d=16, scale=0.3)
    inputs.mask[..., :128] = True
    judge = Judge()
    forward_only = mutation is not None and mutation.kernel.startswith("forward")
    with interpreted(ptx, way):
        judge.compare("", inputs, **({"wrt": ()} if forward_only else {}))
    judge.verdict()


def test_what_mutations_are_seen_by(ptx):
    seen(ptx)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_of_the_ptx_is_caught(ptx, mutation, monkeypatch):
    mangled = ptx.variants(90)[Kernel("bf16", mutation.head_dim, mutation.kernel)]
    monkeypatch.setitem(ptx.kernels[90], mangled, mutation.plant(ptx.kernels[90][mangled]))
    with pytest.raises((Finding, AssertionError)):
        seen(ptx, mutation)


def test_executed_instructions(ptx):
    """Per warp: the same around the loop however many keys there are, and in the loop so many for each tile."""
    found = []
    for k in (128, 192, 256):
        inputs = draw(seed=1, dtype=BF16, batch=(3,), heads=1, q=128, k=k, d=32, bias=(1, 1, 128, k), mask=None)
        harness.forward(ptx, *inputs.tensors)
        (machines,) = ptx.launched.values()
        issued = sum(machine.issued for machine in machines)
        found.append(executed(machines[0].kernel, issued, sum(machine.count for machine in machines) // 32))
    assert found[1].loop - found[0].loop == found[2].loop - found[1].loop > 500
    assert found[0].epilogue == found[2].epilogue > 100
