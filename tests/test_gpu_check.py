# SPDX-License-Identifier: BSD-3-Clause
"""The check of the first minutes on a card, without one: its table finds what is wrong and leaves out no kernel, its times
are written shape by shape, and no part of it stops the next. No time is asserted."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_calls
import torch
from cuda_emulator import harness, kernels
from cuda_emulator.as_cpu import Operator, as_cpu_kernels
from tolerance import Judge

from torch_gated_attn import gated_attention_with_lse

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_table")


@pytest.fixture
def times(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_times")


def test_every_promise_holds_on_the_cpu(table):
    ways = [way for way in table.WAYS if way.name in ("shared bias", "odd, float32 bias", "float32, no bias")]
    assert len(ways) == 3
    cells = [table.run_cell(way, promise, "cpu") for way in ways for promise in table.PROMISES]
    assert [cell for cell in cells if cell.right is False] == []
    assert {cell.promise for cell in cells if cell.right} == set(table.PROMISES)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
def test_every_kernel_that_is_compiled_is_in_the_table(table, library, monkeypatch):
    monkeypatch.setattr(table, "Q", 17)
    harness.LAUNCHED.clear()
    with warnings.catch_warnings(), as_cpu_kernels(Operator(library)):
        warnings.simplefilter("ignore")
        cells = [table.run_cell(way, "pairs", "cpu") for way in table.WAYS]
    assert [cell for cell in cells if not cell.right] == []
    compiled = {kernel.variant for kernel in kernels.of_library(library._name)}
    assert compiled - {kernel.variant for kernel in harness.LAUNCHED} == set()


def test_what_is_wrong_is_marked_and_named(table, monkeypatch):
    def wrong(*args, **kwargs):
        out, lse = gated_attention_with_lse(*args, **kwargs)
        return out * 1.01, lse

    way = table.Way("one", dtypes=(torch.float32,))
    assert table.run_cell(way, "D=8", "cpu").mark == "."
    monkeypatch.setattr(table, "Judge", functools.partial(Judge, wrong))
    cell = table.run_cell(way, "D=8", "cpu")
    assert cell.mark == "X"
    assert cell.wrong[0].startswith("float32: out: largest error")
    assert table.run_cell(table.Way("no bias", bias=None), "low", "cpu").mark == "-"


def test_a_device_in_error_starts_the_script_anew(table, monkeypatch, tmp_path, capsys):
    def illegal(way, dtype, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(table, "WAYS", [table.Way("first"), table.Way("second")])
    monkeypatch.setattr(table, "PROMISES", {"good": lambda *_: [], "illegal": illegal})
    anew = []
    monkeypatch.setattr(table.os, "execv", lambda program, arguments: anew.append(arguments) or sys.exit(7))
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit):
        table.main()
    assert anew[0][1:] == [table.__file__, str(tmp_path), "--device", "cpu", "--first", "2"]
    monkeypatch.setattr(sys, "argv", anew[0][1:])
    with pytest.raises(SystemExit):
        table.main()
    assert anew[1][-2:] == ["--first", "4"]
    monkeypatch.setattr(sys, "argv", anew[1][1:])
    assert table.main() == 1
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [(line["way"], line["right"]) for line in lines] == [
        (way, right) for way in ("first", "second") for right in (True, False)
    ]
    printed = capsys.readouterr().out
    assert "first  . X\n" in printed
    assert "X second / illegal: bfloat16: RuntimeError: CUDA error" in printed
    assert "2 of 4 cells right, 0 not tried" in printed


def test_times_are_written_shape_by_shape(times, monkeypatch, tmp_path, capsys):
    measured = times.measure
    seen = []

    def measure(shape, *others, **options):
        seen.append(len((tmp_path / "times.jsonl").read_text().splitlines()))
        if shape.workload.name == "T511":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(shape, *others, **options)

    monkeypatch.setattr(times, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["gpu_times.py", str(tmp_path), "--device", "cpu", "--shrink", "32"])
    assert times.main() == 1
    assert seen == list(range(1, len(seen) + 1))  # the machine, then a line for each shape before the next is begun
    lines = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert "cpu" in lines[0]["machine"]
    by_shape = {line["shape"]: line for line in lines[1:]}
    assert set(by_shape["T256 bfloat16"]["milliseconds"]) == {"operator", "eager", "sdpa"}
    assert "out of memory" in by_shape["T511 bfloat16"]["error"]
    assert all("error" not in t for line in lines[1:] for t in line.get("milliseconds", {}).values())
    printed = capsys.readouterr().out
    assert "T512 bfloat16 " in printed
    assert "goal, H100: 0.25 / 1.0 ms" in printed
    assert "published, H100: 15.16 ms" in printed
    assert "published, A100: 0.366 ms" in printed


def test_no_shape_is_begun_when_the_time_is_over(times, monkeypatch, tmp_path, capsys):
    arguments = ["gpu_times.py", str(tmp_path), "--device", "cpu", "--shrink", "32", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert times.main() == 0
    assert "T256 bfloat16: no time left" in capsys.readouterr().out
    assert len((tmp_path / "times.jsonl").read_text().splitlines()) == 1


def test_spacings_above_rounding(times, monkeypatch):
    """A result two spacings of bfloat16 off, rounded: at 1.0 they are 2^-7."""
    inputs = times.core_inputs(times.make_inputs(times.triangle(16), torch.bfloat16))
    gold = times.peers.eager(*(None if t is None else t.double() for t in inputs.tensors))
    largest = gold.abs().max().item()
    spacing = 2.0 ** (torch.tensor(largest).log2().floor().item() - 7)
    monkeypatch.setattr(times.peers, "operator", lambda *_: (gold[:4].bfloat16().double() + 2 * spacing).bfloat16())
    assert times.spacings_above_rounding(inputs) == pytest.approx(2, abs=0.6)


# Stands for Python in the script: says what it was called with, fails for the table, and hangs where it is told to.
STUB = """#!/bin/sh
echo "called: $*"
case "$*" in
  *gpu_table*) exit 3 ;;
  *gpu_times*) [ -z "$HANG" ] || exec sleep 60 ;;
esac
"""


def check(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    stub = folder / "bin"
    stub.mkdir()
    (stub / "python3").write_text(STUB)
    (stub / "python3").chmod(0o755)
    path = f"{stub}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_check.sh"), str(folder / "results"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "DEVICE": "cpu", "PATH": path, **environment},
    )


def test_no_part_stops_the_next(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 1
    called = [line for line in done.stdout.splitlines() if line.startswith("called")]
    assert [part for part in ("gpu_table", "gpu_times", "pytest") if any(part in line for line in called)] == [
        "gpu_table",
        "gpu_times",
        "pytest",
    ]
    assert "=== table: exit 3" in done.stdout
    assert "=== times: exit 0" in done.stdout
    assert done.stdout.splitlines()[-1] == "=== not right or not finished: table;"
    assert "gpu_table" in (tmp_path / "results" / "table.txt").read_text()


def test_a_part_that_hangs_is_stopped_and_the_whole_ends_in_time(tmp_path):
    done = check(tmp_path, "times tests", "2", HANG="1")
    assert "=== times, at most 2 s" in done.stdout
    assert "=== tests: no time left" in done.stdout
    assert done.stdout.splitlines()[-1] == "=== not right or not finished: times; tests;"


def test_the_folder_is_asked_for():
    done = subprocess.run(["bash", str(BENCHMARKS / "gpu_check.sh")], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "the first argument is a folder for the results" in done.stderr


def test_the_calls_for_the_sanitizer_run():
    tiny_calls.main("cpu")
