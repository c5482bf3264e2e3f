# SPDX-License-Identifier: BSD-3-Clause
"""`python -m torch_gated_attn selftest` finds a good build good, and a wrong or crashing one not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from torch_gated_attn import _C, cli, functional, reference
from torch_gated_attn.cli import selftest

DTYPES = ["float64", "float32", "bfloat16", "float16"]


def test_every_instruction_set_of_this_machine(capsys):
    assert cli.main(["selftest"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["device", "kernels", "dtype", "error", "result"]
    rows = [line for line in table if line[0] == "cpu"]
    for capability in _C.cpu_capabilities:
        found = [line for line in rows if line[1] == capability]
        if found[0][2] == "all":
            assert found[0][3:] == ["not", "on", "this", "machine"]
            assert capability != "default"
        else:
            assert [line[2] for line in found] == DTYPES
            assert all(line[-1] == "ok" for line in found)


@pytest.mark.parametrize("index", range(7), ids=["out", "lse", "d_query", "d_key", "d_value", "d_gate", "d_bias"])
def test_each_wrong_result_is_found(monkeypatch, index):
    """One result a few per cent too large."""
    evaluate = selftest.evaluate

    def wrong(function, *arguments):
        results = evaluate(function, *arguments)
        if function is functional.gated_attention_with_lse and index < len(results):
            results[index] = results[index] * 1.05
        return results

    monkeypatch.setattr(selftest, "evaluate", wrong)
    assert selftest.judge(torch.float32, "cpu")[0] is False


def test_exit_code_of_a_wrong_build(monkeypatch, capsys):
    def unscaled(*arguments, **options):
        return reference.gated_attention_with_lse(*arguments, **{**options, "scale": 1.0})

    monkeypatch.setattr(functional, "gated_attention_with_lse", unscaled)
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("WRONG") == len(DTYPES)


def test_a_crash_is_a_row():
    crash = [sys.executable, "-c", "import os; os.abort()"]
    process = subprocess.Popen(crash, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    (row,) = selftest.collect(process, "cpu", "avx2")
    assert row.verdict.startswith("FAILED: exit code -6")
