# SPDX-License-Identifier: BSD-3-Clause
"""What the report on machine code says of other libraries' kernels; none of them, and no compiler, is needed."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import types

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("sass_peers")


def test_what_is_not_installed_is_said(peers, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [*peers.sdpa("sm_90", "cuobjdump"), *peers.trifast("sm_90", "cuobjdump", [16, 32])] == []
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "PyTorch's kernels: skipped, this torch has no CUDA",
        "trifast's kernels: skipped, it is not installed",
    ]


def test_only_the_kernels_that_small_heads_take_are_read(peers, monkeypatch, tmp_path):
    library = tmp_path / "lib" / "libtorch_cuda.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    )
    names = ["fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "fmha_cutlassF_bf16_aligned_32x128_gmem_sm80", "softmax"]

    def extract(command, cwd, **options):
        assert command == ["cuobjdump", "-xelf", ".sm_90.cubin", str(library)]
        for name in names:
            (pathlib.Path(cwd) / f"{name}.cubin").write_text(name)

    monkeypatch.setattr(subprocess, "run", extract)
    kernel = types.SimpleNamespace(symbol=f"_Z40{names[0]}N22PyTorchMemEff")
    monkeypatch.setattr(peers, "disassemble", lambda cubin, *rest: [kernel] if cubin.stem == names[0] else 1 / 0)
    assert [*peers.sdpa("sm_90", "cuobjdump")] == [(f"SDPA {names[0]}", kernel, 32)]


def test_arguments_of_a_triton_kernel(peers):
    names = ["q_ptr", "stride_qh", "stride_qd", "lse_ptr", "mask_ptr", "stride_maskn", "sm_scale", "N", "H", "DIM"]
    signature, constants, attributes = peers.describe(types.SimpleNamespace(arg_names=names), {"DIM": 32})
    kinds = ["*bf16", "i32", "constexpr", "*fp32", "*i1", "constexpr", "fp32", "i32", "i32", "constexpr"]
    assert signature == dict(zip(names, kinds, strict=True))
    assert constants == {(9,): 32, (2,): 1, (5,): 1}
    assert {names[place] for (place,) in attributes} == {"q_ptr", "stride_qh", "lse_ptr", "mask_ptr", "N"}
