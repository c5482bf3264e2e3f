# SPDX-License-Identifier: BSD-3-Clause
"""The report on machine code counts what it should: on a listing written for the purpose, no compiler is needed."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("sass"), pytest.importorskip("sass_report")


# A loop over 16 scores from 0x10 to 0x1a0, within an outer one. A rare path lies behind the exit, 0x1d0 to 0x1e0.
LISTING = [
    (0x00, None, "MOV", " R1, RZ"),
    (0x10, None, "LDSM.16.M88.4", " R4, [R2]"),
    (0x20, None, "LDG.E.64", " R6, [R2]"),
    (0x30, None, "HMMA.16816.F32.BF16", " R8, R4, R6, R8"),
    (0x40, "!PT", "LDS", " RZ, [RZ]"),
    (0x50, "P0", "BRA", " 0x1d0"),
    *((0x60 + 0x10 * n, None, "MUFU.EX2", " R1, R1") for n in range(17)),
    (0x170, None, "STS.128", " [R2], R8"),
    (0x1A0, "P1", "BRA", " 0x10"),
    (0x1B0, "P2", "BRA", " 0x0"),
    (0x1C0, None, "EXIT", ""),
    (0x1D0, None, "FMUL", " R1, R1, R1"),
    (0x1E0, None, "BRA", " 0x60"),
]


def kernel(sass, listing=LISTING, stack=0):
    code = [sass.Instruction(*line) for line in listing]
    return sass.Kernel("_ZN4cuda14forward_kernelI", 64, stack, code)


def test_the_inner_loop_is_found_with_its_code_out_of_line(modules):
    sass, _ = modules
    loops = kernel(sass).loops()
    counted = [loop for loop in loops if sass.cost(loop, 1)]
    assert [{i.address for i in loop} >= {0x10, 0x1A0, 0x1D0, 0x1E0} for loop in counted] == [True] * len(counted)
    assert counted
    assert all(0x1B0 not in {i.address for i in loop} for loop in counted)


def test_cost_per_element(modules):
    sass, _ = modules
    loop = next(loop for loop in kernel(sass).loops() if sass.cost(loop, 1))
    cost = sass.cost(loop, teams=2)
    assert cost.slots == len(loop) / 16  # 17 exponentials: one of them rescales
    assert (cost.hmma, cost.ldsm, cost.exp2) == (1 / 16, 1 / 16, 17 / 16)
    # Words: ldmatrix 4, LDG 2, STS 4. The LDS is never executed. Two teams load what LDG brings.
    assert cost.bounds["shared"] == pytest.approx(10 * 4 / 16 / sass.SHARED_BYTES)
    assert cost.bounds["L2"] == pytest.approx(2 * 4 / 2 / 16 / sass.L2_BYTES)
    assert cost.binding == max(cost.bounds, key=cost.bounds.get)


def row(modules, **changes):
    sass, report = modules
    fields = {"arch": "sm_90", "dtype": "bf16", "head_dim": 16, "name": "forward", "access": "half"}
    fields |= {"strip": False, "shares": True, "kernel": kernel(sass), "cost": sass.Cost(8, 1, 1, 1, {"issue": 0.06})}
    return report.Row(**{**fields, **changes})


def test_budgets(modules):
    sass, report = modules
    assert report.broken_budgets([row(modules)]) == []
    slow = sass.Cost(8.6, 1, 1, 1, {"issue": 0.07})
    assert report.broken_budgets([row(modules, cost=slow)]) == [
        "forward D=16 half shared: 8.60 issue slots per element, at most 8.5"
    ]
    assert report.broken_budgets([row(modules, cost=slow, arch="sm_80")]) == []
    assert report.broken_budgets([row(modules, kernel=kernel(sass, stack=8))]) == [
        "sm_90 bf16 forward D=16 half shared: 8 bytes of stack, 0 local accesses"
    ]
    assert report.broken_budgets([row(modules, kernel=kernel(sass, stack=8), head_dim=96)]) == []
    atomic = kernel(sass, [*LISTING, (0x1F0, None, "RED.E.ADD.F32", " [R2], R1")])
    assert report.broken_budgets([row(modules, kernel=atomic)]) == [
        "sm_90 bf16 forward D=16 half shared: 1 atomic instructions"
    ]
    pair = [
        row(modules, head_dim=32, name=name, strip=strip, shares=False, cost=sass.Cost(10.5, 1, 1, 1, {"L2": 0.15}))
        for name, strip in (("backward_query", True), ("backward_key", False))
    ]
    assert report.broken_budgets(pair) == [
        "backward D=32 half: 21.00 issue slots per element, at most 20.0",
        "backward at 512^3, half bias: 695 us, at most 600",
    ]


def test_every_instantiation_of_a_head_dim_is_found(modules):
    _, report = modules
    found = [source.stem for source in report.instantiations([16, 32], ["bf16", "fp16"])]
    assert {"forward_bf16_16", "forward_fp16_32", "backward_bf16_32"} <= set(found)
    assert not any("64" in stem.split("_") for stem in found)


def test_without_a_compiler_it_says_so():
    environment = dict(os.environ, PATH="/nowhere")
    report = [sys.executable, BENCHMARKS / "sass_report.py"]
    run = subprocess.run(report, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0
    assert run.stdout.startswith("sass_report: skipped, needs nvcc on the PATH")
