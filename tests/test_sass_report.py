# SPDX-License-Identifier: BSD-3-Clause
"""The report on machine code counts what it should: on a listing written for the purpose, no compiler is needed."""

from __future__ import annotations

import os
import pathlib
import shutil
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
    (loop,) = kernel(sass).loops()
    addresses = {i.address for i in loop.code}
    assert addresses >= {0x10, 0x1A0, 0x1D0, 0x1E0}
    assert not addresses & {0x0, 0x1B0, 0x1C0}


def test_a_loop_without_exponentials_belongs_to_the_one_around_it(modules):
    sass, _ = modules
    products = [(0x174, None, "HMMA.16816.F32.BF16", " R8, R4, R6, R8"), (0x178, "P3", "BRA", " 0x174")]
    listing = sorted([*LISTING, *products], key=lambda line: line[0])
    (loop,) = kernel(sass, listing).loops()
    assert {0x10, 0x174, 0x178} <= {i.address for i in loop.code}
    assert sass.cost(loop).hmma == 2 / 16


def test_least_leaves_out_what_a_branch_may_skip(modules):
    sass, _ = modules
    (loop,) = kernel(sass).loops()
    assert len(loop.code) - loop.least == 2  # the rare path
    # A skipped stretch, which BSYNC leaves for where BSSY said; a way round without exponentials does not count.
    skip = [(0x172, None, "BSSY", " B0, 0x17c"), (0x174, "P4", "BRA", " 0x17a"), (0x176, None, "FMUL", " R1, R1, R1")]
    skip += [(0x178, None, "BSYNC", " B0"), (0x17A, None, "BSYNC", " B0"), (0x17C, None, "FMUL", " R1, R1, R1")]
    early = [(0x14, "P5", "BRA", " 0x1a0")]
    listing = sorted([*LISTING, *skip, *early], key=lambda line: line[0])
    (loop,) = kernel(sass, listing).loops()
    assert len(loop.code) - loop.least == 2 + 2


def test_cost_per_element(modules):
    sass, _ = modules
    (loop,) = kernel(sass).loops()
    cost = sass.cost(loop, teams=2)
    assert cost.slots == len(loop.code) / 16  # 17 exponentials: one of them rescales
    assert cost.least == cost.slots - 2 / 16
    assert (cost.hmma, cost.ldsm, cost.exp2, cost.reductions, cost.local) == (1 / 16, 1 / 16, 17 / 16, 0, 0)
    # Words: ldmatrix 4, LDG 2, STS 4. The LDS is never executed. Two teams load what LDG brings.
    assert cost.bounds["shared"] == pytest.approx(10 * 4 / 16 / sass.SHARED_BYTES)
    assert cost.bounds["L2"] == pytest.approx(2 * 4 / 2 / 16 / sass.L2_BYTES)
    assert cost.binding == max(cost.bounds, key=cost.bounds.get)
    assert sass.cost(loop, elements=8).exp2 == 17 / 8


def test_cost_of_what_only_other_libraries_do(modules):
    sass, _ = modules
    others = [
        (0x172, None, "HGMMA.64x32x16.F32.BF16", " R24, gdesc[UR4], R24"),
        (0x174, None, "RED.E.ADD.F32", " [R2], R1"),
        (0x176, None, "ATOMS.ADD", " RZ, [R2], R1"),
        (0x178, None, "LDL", " R1, [R1]"),
        (0x17A, None, "STL", " [R1], R1"),
        (0x17C, None, "LDSM.16.M88", " R4, [R2]"),
    ]
    others += [
        (0x17D, None, "HMMA.1688.F32.TF32", " R8, R4, R6, R8"),
        (0x17E, None, "HMMA.1688.F32.BF16", " R8, R4, R6, R8"),
    ]
    (loop,) = kernel(sass, sorted([*LISTING, *others], key=lambda line: line[0])).loops()
    cost = sass.cost(loop)
    assert cost.hmma == pytest.approx((1 + 4 + 1 + 0.5) / 16)
    assert (cost.ldsm, cost.reductions, cost.local) == (2 / 16, 1 / 16, 2 / 16)
    assert cost.bounds["HMMA"] == pytest.approx((2.5 * sass.HMMA_CLOCKS + 4 * sass.WGMMA_CLOCKS) / 16)


def cost(sass, slots, **bounds):
    return sass.Cost(slots, slots, hmma=1, exp2=1, ldsm=1, reductions=0, local=0, bounds=bounds)


def row(modules, **changes):
    sass, report = modules
    fields = {"arch": "sm_90", "dtype": "bf16", "head_dim": 16, "name": "forward", "access": "half"}
    fields |= {"strip": False, "shares": True, "kernel": kernel(sass), "cost": cost(sass, 8, issue=0.06)}
    fields |= {"before": 900, "behind": 800, "warps": 12}
    return report.Row(**{**fields, **changes})


def test_budgets(modules):
    sass, report = modules
    assert report.broken_budgets([row(modules)]) == []
    slow = cost(sass, 9.6, issue=0.07)
    assert report.broken_budgets([row(modules, cost=slow)]) == [
        "forward D=16 half shared: 9.60 issue slots per element, at most 9.5"
    ]
    assert report.broken_budgets([row(modules, cost=slow, arch="sm_80")]) == []
    assert report.broken_budgets([row(modules, kernel=kernel(sass, stack=8))]) == [
        "sm_90 bf16 forward D=16 half shared: 8 bytes of stack, 0 local accesses"
    ]
    assert report.broken_budgets([row(modules, kernel=kernel(sass, stack=8), head_dim=96)]) == []
    for dtype, head_dim, broken in (("bf16", 32, 1), ("bf16", 48, 0), ("fp32", 32, 1), ("fp32", 48, 0)):
        spilled = row(modules, dtype=dtype, head_dim=head_dim, name="backward_key", kernel=kernel(sass, stack=8), cost=None)
        assert len(report.broken_budgets([spilled])) == broken
    atomic = kernel(sass, [*LISTING, (0x1F0, None, "RED.E.ADD.F32", " [R2], R1")])
    assert report.broken_budgets([row(modules, kernel=atomic)]) == [
        "sm_90 bf16 forward D=16 half shared: 1 atomic instructions"
    ]
    step = [
        row(modules, dtype="fp32", head_dim=32, access="float", name=name, strip=strip, cost=cost(sass, 80, HMMA=2.0))
        for name, strip in (("forward", False), ("backward_query", True), ("backward_key", False))
    ]
    assert [line.split(":")[0] for line in report.broken_budgets(step)] == [
        "fp32 forward D=32 float shared",
        "fp32 backward_query D=32 float strip shared",
        "fp32 backward_key D=32 float shared",
        "fp32 step of 256^3, H=4, D=32",
    ]
    pair = [
        row(modules, head_dim=32, name=name, strip=strip, shares=False, cost=cost(sass, 11.5, L2=0.15))
        for name, strip in (("backward_query", True), ("backward_key", False))
    ]
    assert report.broken_budgets(pair) == [
        "backward D=32 half: 23.00 issue slots per element, at most 22.1",
        "backward at 512^3, half bias: 695 us, at most 600",
    ]


def test_budgets_around_the_loops(modules):
    _, report = modules
    assert report.broken_budgets([row(modules, behind=901)]) == [
        "forward D=16 half shared: 901 instructions behind a row tile, at most 900"
    ]
    assert report.broken_budgets([row(modules, behind=901, access="general", shares=False)]) == []
    assert report.broken_budgets([row(modules, warps=4)]) == ["forward D=16 half shared: 4 resident warps, at least 8"]


# Before the loop 0x0 and 0x4, behind it 0x1b0 to 0x1c0; the rare path is the loop's, 0x200 a subroutine.
AROUND = [
    (0x00, None, "MOV", " R1, RZ"),
    (0x04, "P4", "BRA", " 0x1b4"),
    *LISTING[1:-5],
    (0x1A0, "P1", "BRA", " 0x10"),
    (0x1B0, "P2", "BRA", " 0x1bc"),
    (0x1B4, None, "CALL.REL.NOINC", " 0x200"),
    (0x1B8, None, "STG.E", " [R2], R1"),
    (0x1BC, None, "NOP", ""),
    (0x1C0, None, "EXIT", ""),
    *LISTING[-2:],
    (0x200, None, "MUFU.RCP", " R1, R1"),
    (0x204, None, "RET.REL.NODEC", " R4 0x0"),
]


def test_instructions_around_the_loops(modules):
    sass, _ = modules
    found = kernel(sass, AROUND)
    assert found.around(found.loops()) == (2, 5)


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "warps"),
    [
        ("sm_90", 168, 128, 20_000, 12),  # 3 warps to each quarter of the registers
        ("sm_90", 169, 128, 20_000, 8),  # registers come by 8
        ("sm_90", 239, 256, 60_000, 8),
        ("sm_90", 128, 128, 60_000, 12),  # three times 60,000 bytes and a KiB each
        ("sm_80", 128, 128, 60_000, 8),
        ("sm_90", 32, 128, 0, 64),
        ("sm_86", 32, 128, 0, 48),
        ("sm_120", 128, 128, 101_000, 4),
        ("sm_120", 128, 128, 102_000, 0),
    ],
)
def test_resident_warps(modules, arch, registers, threads, shared, warps):
    sass, _ = modules
    assert sass.resident_warps(arch, registers, threads, shared) == warps


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_facts_of_every_kernel_with_a_main_loop(modules, tmp_path):
    _, report = modules
    facts = report.tile_facts(str(tmp_path))
    assert facts["half backward_query D=32 half strip"].teams == 4
    assert facts["fp32 backward_query D=32 float strip"].teams == 2
    assert facts["half forward D=16 none"].row_tiles == facts["fp32 forward D=16 none"].row_tiles == 2
    kinds = {label.split()[1] for label in facts}
    assert kinds == {"forward", "backward_query", "backward_key", "backward_bias"}
    for label, fact in facts.items():
        assert fact.threads % 32 == 0, label
        assert 0 < fact.shared_bytes < 228 * 1024, label


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_spill_breaks_a_budget(modules, arch, dtype):
    """At every head_dim up to 64 and in the kernels that have none, whether or not the stack has grown."""
    sass, report = modules
    reload = kernel(sass, [*LISTING, (0x1F0, None, "LDL", " R1, [R1]")])
    for head_dim in (0, 16, 32, 48, 64):
        spilled = row(modules, arch=arch, dtype=dtype, head_dim=head_dim, kernel=reload, shares=False)
        assert len(report.broken_budgets([spilled])) == 1


def test_a_broken_budget_is_the_exit_status(modules, monkeypatch, capsys):
    sass, report = modules
    monkeypatch.setattr(report, "find_tool", lambda name: name)
    monkeypatch.setattr(report, "tile_facts", lambda folder: {})
    monkeypatch.setattr(report.shutil, "which", lambda name: name)
    for stack, status in ((0, 0), (8, 1)):
        compiled = row(modules, kernel=kernel(sass, stack=stack))
        monkeypatch.setattr(report, "compile_and_read", lambda *arguments, row=compiled: [row])
        monkeypatch.setattr(sys, "argv", ["sass_report.py", "--archs", "sm_90", "--head-dims", "16", "--dtypes", "bf16"])
        assert report.main() == status
        assert ("budget broken: sm_90 bf16 forward D=16 half shared: 8 bytes of stack" in capsys.readouterr().out) == status


@pytest.mark.parametrize(
    ("symbol", "dtype", "label"),
    [
        ("19prepare_rows_kernelILNS_5DTypeE2ELi16EEEv", "bf16", "prepare_rows D=16"),
        ("21transpose_bias_kernelILNS_5DTypeE3ELb1EEEv", "fp16", "transpose_bias"),
        (
            "21backward_query_kernelINS0_10QueryShapeILNS_5DTypeE2ELi48ELNS0_10BiasAccessE2ELb1EE4typeEEEv",
            "bf16",
            "backward_query D=48 float strip",
        ),
    ],
)
def test_kernels_are_known_by_their_symbols(modules, symbol, dtype, label):
    sass, report = modules
    symbol = f"_ZN16torch_gated_attn4cuda{symbol}NS0_14BackwardParamsE"
    found = report.describe(sass.Kernel(symbol, 64, 0, kernel(sass).code), "sm_80", {})
    assert (found.dtype, found.label) == (dtype, label)


def test_every_kernel_of_a_head_dim_is_found(modules):
    _, report = modules
    found = [source.stem for source in report.instantiations([16, 32], report.TYPES)]
    assert {"forward_bf16_16", "forward_fp16_32", "backward_bf16_32", "backward_fp32_16", "bias_workspace"} <= set(found)
    assert not any("64" in stem.split("_") for stem in found)


def test_the_report_has_all_that_must_not_spill(modules):
    _, report = modules
    compiled = {int(source.stem.split("_")[-1]) for source in report.ROOT.glob("instantiations/*_bf16_*.cu")}
    assert set(report.HEAD_DIMS) == {d for d in compiled if d <= report.BUDGETS["spill_free_up_to_head_dim"]}


def test_without_a_compiler_it_says_so():
    environment = dict(os.environ, PATH="/nowhere")
    report = [sys.executable, BENCHMARKS / "sass_report.py"]
    run = subprocess.run(report, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0
    assert run.stdout.startswith("sass_report: skipped, needs nvcc on the PATH")
