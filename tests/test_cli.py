# SPDX-License-Identifier: BSD-3-Clause
"""`python -m torch_gated_attn`: what the commands print, write and refuse. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import torch_gated_attn
from torch_gated_attn import _C, cli

pytest.importorskip("typer")
pytest.importorskip("rich")

from torch_gated_attn._bench import memory
from torch_gated_attn._bench.workloads import DTYPES, load, make_inputs
from torch_gated_attn.cli import shape

SMALL = ["--batch", "2x3", "--heads", "4", "--kv-heads", "2", "--q", "9", "--k", "11", "--head-dim", "8"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # rich wraps at the width of the terminal
    monkeypatch.setenv("TERM", "dumb")


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in ("info", "selftest", "bench", "explain"):
        assert f" {command} " in printed


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == torch_gated_attn.__version__


def test_info_says_what_a_bug_report_needs(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for fact in (torch.__version__, torch_gated_attn.__version__, _C.compiler, _C.cpu_capability(), sys.version.split()[0]):
        assert fact in printed


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["build"] == {
        "torch": _C.torch_version,
        "compiler": _C.compiler,
        "cuda": _C.cuda_version,
        "instruction_sets": list(_C.cpu_capabilities),
    }
    assert facts["instruction_set"] == _C.cpu_capability()
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_bench_of_a_shape(capsys, tmp_path, monkeypatch, device):
    measured = []
    monkeypatch.setattr(memory, "measure", lambda path, *call: measured.append((path, *call)) or 12.34)
    files = ["--json", str(tmp_path / "bench.json"), "--png", str(tmp_path / "bench.png")]
    options = ["--no-compile", "--repeat", "2", "--dtype", "float32", "--dtype", "bfloat16", "--bias", "full"]
    assert cli.main(["bench", *SMALL, *options, *files, "--device", device]) == 0
    printed = capsys.readouterr().out
    for text in ("batch 2x3, heads 4 (kv 2), Q 9, K 11, head_dim 8", "float32", "bfloat16", "forward+backward", "12.3"):
        assert text in printed, printed
    for path in ("torch_gated_attn", "plain PyTorch", "SDPA"):
        assert printed.count(f"  {path} ") == 2

    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert [result["dtype"] for result in document["results"]] == ["float32", "bfloat16"]
    for result in document["results"]:
        assert result["workload"]["bias_shape"] == [2, 3, 4, 9, 11]
        assert result["memory_mib"]["paths"] == {"operator": 12.34, "eager": 12.34, "sdpa": 12.34}
        assert [c["direction"] for c in result["comparisons"]] == ["forward", "forward+backward"]
        for comparison in result["comparisons"]:
            assert set(comparison["paths"]) == {"operator", "eager", "sdpa"}
            assert all(len(path["seconds"]) >= 2 for path in comparison["paths"].values())
    assert [(path, dtype, where) for path, _, dtype, where in measured] == [
        (path, dtype, device) for dtype in ("float32", "bfloat16") for path in ("operator", "eager", "sdpa")
    ]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_path_that_fails_is_named_and_the_others_are_timed(capsys, monkeypatch):
    def out_of_memory(*arguments):
        raise RuntimeError("the process ended with -9")

    def broken(*tensors):
        raise NotImplementedError("no such [kernel]")

    monkeypatch.setattr(memory, "measure", out_of_memory)
    monkeypatch.setattr("torch_gated_attn._bench.peers.sdpa", broken)
    assert cli.main(["bench", *SMALL, "--no-compile", "--repeat", "1"]) == 0
    printed = capsys.readouterr().out
    assert "SDPA: NotImplementedError: no such [kernel]" in printed
    assert "torch_gated_attn: the process ended with -9" in printed


def test_memory_is_measured_in_a_process_of_its_own(device):
    """64 MiB of scores and more for plain PyTorch, 4 MiB of results and gradients for the operator."""
    (workload,) = shape.workloads(None, "8", 4, None, 512, None, 8, None, None)
    needed = memory.needed_mib(workload, "float32")
    used = {path: memory.measure(path, workload, "float32", device) for path in ("operator", "eager")}
    assert needed * 0.5 < used["operator"] < used["eager"] / 3, (needed, used)


def test_memory_of_a_path_that_fails_says_why():
    (workload,) = shape.workloads(None, "2", 1, None, 4, None, 4, None, None)
    with pytest.raises(RuntimeError, match=r"memory of fast ended with 1: KeyError: 'fast'$"):
        memory.measure("fast", workload, "float32")


def test_list_has_every_workload(capsys):
    assert cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    for workload in load():
        assert f" {workload.name} " in printed
        assert workload.title in printed


@pytest.mark.parametrize("bias", list(shape.Bias))
def test_options_make_the_shape_they_name(bias):
    (workload,) = shape.workloads(None, "2x3", 4, 2, 9, 11, 8, bias, False)
    inputs = make_inputs(workload, DTYPES["float32"])
    assert inputs.query.shape == (2, 3, 4, 9, 8)
    assert inputs.key.shape == inputs.value.shape == (2, 3, 2, 11, 8)
    assert inputs.gate is None
    assert inputs.mask.shape == (2, 3, 1, 1, 11)
    expected = {shape.Bias.shared: (1, 1, 4, 9, 11), shape.Bias.full: (2, 3, 4, 9, 11), shape.Bias.none: None}[bias]
    assert (None if inputs.bias is None else inputs.bias.shape) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "Z9"], "workloads must be among T1, T2"),
        (["bench", "T1", "--q", "3"], "give the names of workloads or the options of a shape, not both"),
        (["bench", "--batch", "4y"], "--batch must be sizes separated by x, such as 64 or 4x24, but is 4y"),
        (["bench", "--heads", "4", "--kv-heads", "3"], "--kv-heads must divide --heads 4, but is 3"),
        (["bench", "--dtype", "float8"], "--dtype must be among float32, bfloat16, float16, float64, but is float8"),
        (["bench", "--device", "tpu"], "--device must be cpu or cuda, but is tpu"),
        (["bench", "--repeat", "0"], "--repeat"),
        (["destroy"], "No such command 'destroy'"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_explain_asks_the_library(capsys, monkeypatch):
    calls = []

    def explain(**call):
        calls.append(call)
        return SimpleNamespace(kernel="few queries", reason="Q is 9 [or so]", device="cpu", details={"head_dim": "8"})

    monkeypatch.setattr(torch_gated_attn, "explain", explain)
    assert cli.main(["explain", *SMALL, "--no-gate", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("few queries, Q is 9 [or so]") == 2
    assert "head_dim: 8" in printed
    forward, backward = calls
    assert (forward["grad"], backward["grad"]) == ([], ["query", "key", "value", "bias"])
    assert forward["query"].shape == (2, 3, 4, 9, 8)
    assert forward["gate"] is None
    assert forward["mask"].dtype == torch.bool


def test_explain_prints_the_librarys_answer(capsys):
    assert cli.main(["explain", *SMALL, "--device", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("sm_90: ") == 2


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_without_the_extra_one_sentence(name):
    program = f"""
import sys
sys.modules[{name!r}] = None
from torch_gated_attn.cli import main
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == (
        f'the command line needs typer and rich, and {name} is not installed: pip install "torch-gated-attn[cli]"'
    )


def test_the_library_imports_neither():
    program = """
import sys
import torch_gated_attn
import torch_gated_attn.cli
print(sorted({"typer", "rich", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
