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
from collections.abc import Iterator

import pytest
import torch
from cuda_emulator import harness, low
from cuda_emulator.as_cpu import Operator, as_cpu_kernels
from cuda_emulator.kernels import Kernel
from inputs import Inputs
from ptx import counts
from ptx.faults import Finding
from ptx.mutations import MUTATIONS
from test_cuda_promises import WAYS, Way
from tolerance import Judge

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = next(way for way in WAYS if way.name == "plain")
SHARED = next(way for way in WAYS if way.name == "shared bias")
DTYPES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def ways_of(dtype: torch.dtype) -> list[Way]:
    """To the tensor-core kernels of this type."""
    return [way for way in WAYS if dtype in way.dtypes and way is not PLAIN]


KINDS = [(dtype, head_dim) for dtype in DTYPES for head_dim in (16, 32) if ways_of(dtype)]
INSTANTIATIONS = (*(f"_{DTYPES[dtype]}_{d}.cu" for dtype, d in KINDS), "bias_workspace.cu", "plain_float.cu")
NEEDED = ("nvcc", "g++", "c++filt")

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in NEEDED),
    reason=f"the PTX comes from a CUDA toolkit: needs {', '.join(NEEDED)}",
)


@pytest.fixture(scope="module")
def ptx():
    from ptx import build, library

    return library.Library(*build.build(INSTANTIATIONS))


def mixed(turn: int) -> Iterator[tuple[Way, tuple[torch.dtype, int]]]:
    """Every way once, with types and head_dims that take turns; the plain kernels take a head_dim of their own."""
    yield PLAIN, (FP32, 0)
    for i, way in enumerate(way for way in WAYS if way is not PLAIN):
        kinds = [kind for kind in KINDS if kind[0] in way.dtypes]
        yield way, kinds[(i + turn) % len(kinds)]


def draw_for(way: Way, kind: tuple[torch.dtype, int], **changes: object) -> Inputs:
    sizes = {} if way is PLAIN else {"d": kind[1]}
    return way.draw(kind[0], heads=1, **{**sizes, **changes})


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
    judge = Judge()
    harness.LAUNCHED.clear()
    for i, way in enumerate(ways_of(kind[0])):
        with interpreted(ptx, way):
            inputs = draw_for(way, kind, masked_rows="mean" if i % 2 else "zero")
            judge.compare(f"{way.name} {name(kind)}", with_dead_rows(inputs))
    judge.verdict()
    compiled = {k for k in ptx.variants(90) if k.dtype == DTYPES[kind[0]] and k.head_dim in (0, kind[1])}
    compiled = {k for k in compiled if not k.variant.startswith(("plain", "copy"))}
    assert len(compiled) >= 10
    assert compiled <= harness.LAUNCHED, sorted(compiled - harness.LAUNCHED)


def test_architectures_differ_in_shared_memory_only(ptx):
    """So what runs for one runs for the other; the strip of dBias for 450 keys fits one of them."""
    assert len(ptx.kernels[80]) > 40
    for mangled, kernel in ptx.kernels[80].items():
        assert kernel.body == ptx.kernels[90][mangled].body, "run test_every_kernel for sm_80 as well"
    launched = []
    for arch in (80, 90):
        judge = Judge()
        harness.LAUNCHED.clear()
        with interpreted(ptx, SHARED, arch):
            judge.compare(f"sm_{arch}", SHARED.draw(BF16, heads=1, q=40, k=450, d=32))
        judge.verdict()
        launched.append({kernel.variant for kernel in harness.LAUNCHED})
    assert launched[0] ^ launched[1] == {
        "backward query, half bias, strip",
        "backward query, half bias",
        "backward bias, half bias",
        "reduce bias",
    }


@pytest.mark.parametrize(("turn", "value"), [(0, -1e5), (1, -1e9), (2, -1e30)])
def test_low_logits(ptx, turn, value):
    """Rows of low logits are as accurate as any."""
    judge = Judge()
    for i, (way, kind) in enumerate(mixed(turn)):
        if way.bias and value >= torch.finfo(FP32 if way.float_bias else kind[0]).min:
            with interpreted(ptx, way):
                case = low.make(draw_for(way, kind, seed=i), slice(3, 9), None, value)
                low.compare(judge, f"{way.name} {name(kind)} {value:g}", case)
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
    for way, kind in mixed(list(POSITIONS).index(positions)):
        if way is PLAIN and positions in ("causal", "a mask of pairs"):
            continue  # its slow loops look at every pair; the other two hold what these do
        with interpreted(ptx, way):
            judge.compare(f"{way.name} {name(kind)}", draw_for(way, kind, **POSITIONS[positions]))
    judge.verdict()


def test_plain_kernels(ptx):
    """Positions, masks and low logits are tried above too."""
    judge = Judge()
    with interpreted(ptx, PLAIN):
        for k, d, dv, masked_rows in ((37, 13, 9, "zero"), (18, 31, 31, "mean")):
            inputs = PLAIN.draw(FP32, heads=1, q=20, k=k, d=d, dv=dv, masked_rows=masked_rows)
            judge.compare(f"{k} {d} {dv}", with_dead_rows(inputs))
    judge.verdict()


def seen(ptx, mutation=None) -> None:
    """A call with full tiles and mixed ones."""
    inputs = SHARED.draw(BF16, seed=3, heads=1, k=150, d=16, scale=0.3)
    inputs.mask[..., :128] = True
    judge = Judge()
    forward_only = mutation is not None and mutation.kernel.startswith("forward")
    with interpreted(ptx, SHARED):
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
    """Per warp: the same after the loop however many keys there are, and in the loop so many for each tile."""
    found = [counts.of_call(ptx, "bf16", 32, keys)["forward, half bias, shared"] for keys in (128, 192, 256)]
    assert found[1].loop - found[0].loop == found[2].loop - found[1].loop > 500
    assert found[0].epilogue == found[2].epilogue > 100
    backward = counts.of_call(ptx, "bf16", 16, 128)
    assert {"backward query, half bias, strip", "backward key, half bias"} <= backward.keys()
    assert all(parts.loop > 0 and parts.prologue > 0 and parts.epilogue > 0 for parts in backward.values())
