# SPDX-License-Identifier: BSD-3-Clause
"""Every option of every command refuses garbage with a usage error, and takes every dtype of the operator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer

from torch_gated_attn import cli
from torch_gated_attn._bench.workloads import DTYPES
from torch_gated_attn.cli.app import app

SMALL = ["--batch", "1", "--heads", "1", "--q", "2", "--head-dim", "4"]
NO_NUMBER = ("", "x", "0", "-1", "1.5", "9" * 20)
GARBAGE = {
    "--batch": ("", "x", "4x", "x4", "4y", "0", "2x-1", "²", "٣", "9" * 20, "99999999999x99999999999"),
    "--heads": NO_NUMBER,
    "--kv-heads": ("", "x", "0", "-1", "3", "9" * 20),
    "--q": (*NO_NUMBER, "99999999999"),
    "--k": NO_NUMBER,
    "--head-dim": NO_NUMBER,
    "--bias": ("", "x"),
    "--dtype": ("", "x", "float8", "Float32", "torch.float32"),
    "--repeat": ("", "x", "0", "-1", "1.5"),
    "--path-limit": ("", "x", "0", "-1", "nan"),
    "WORKLOAD": ("", "Z9", "t1"),
}
DEVICES = {
    "explain": ("", "sm_9", "sm_00", "sm_090", "sm_1234", "sm_9x", "SM_90", "cuda", "cuda:0", "tpu"),
    "bench": ("", "tpu", "cuda:99", "sm_90"),
    "selftest": ("", "tpu", "meta", "cpu:3", "cuda:99", "sm_90"),
}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # rich wraps at the width of the terminal
    monkeypatch.setenv("TERM", "dumb")


def options() -> Iterator[tuple[str, str, bool]]:
    """Each command with each of its options or arguments, and whether it is a flag; as the program itself lists them."""
    for command, parsed in typer.main.get_command(app).commands.items():
        for parameter in parsed.params:
            if parameter.name != "help":
                flag = bool(getattr(parameter, "is_flag", False))
                yield command, parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar, flag


def garbage(command: str, option: str, flag: bool, folder: str) -> tuple[str, ...]:
    if flag:
        return ("x",)
    if option == "--device":
        return DEVICES[command]
    files = (folder, f"{folder}/missing/file.png", "")
    return {"--json": files, "--png": (*files, f"{folder}/x.garbage")}.get(option) or GARBAGE[option]


def refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    try:
        code = cli.main(arguments)
    except BaseException as error:  # a traceback
        return f"{arguments} raised {type(error).__name__}: {error}"
    printed = capsys.readouterr()
    if code != 2 or "Error" not in printed.err:
        return f"{arguments} ended with {code}: {printed.out[-200:]}{printed.err[-200:]}"
    return None


@pytest.mark.parametrize(("command", "option", "flag"), list(options()))
def test_garbage_is_a_usage_error(command, option, flag, tmp_path, capsys):
    cheap = ["--no-compile", "--no-memory", "--repeat", "1"] if command == "bench" else []
    shape = SMALL if command in ("bench", "explain") and option in ("--device", "--dtype", "--json", "--png") else []
    bad = []
    for value in garbage(command, option, flag, str(tmp_path)):
        given = [value] if option == "WORKLOAD" else [f"{option}={value}"]
        bad.append(refuses([command, *cheap, *shape, *given], capsys))
    assert [problem for problem in bad if problem] == []


def test_every_command_is_looked_at():
    found = {command for command, _, _ in options()}
    assert found == {"bench", "explain", "info", "selftest"}
    assert ("explain", "--device", False) in options()
    assert ("bench", "--memory", True) in options()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--device", "sm_9"], 'device must be "cpu" or like "sm_90", but is \'sm_9\''),
        (["selftest", "--device", "tpu"], "--device must be among cpu"),
        (["selftest", "--json"], "--json needs --device"),
        (["bench", "--path-limit", "nan"], "--path-limit must be a positive number of seconds, but is nan"),
        (["bench", "--json", "/"], "--json must be a file that can be written, but is '/'"),
        (["explain", "--q", "99999999999"], "the shape must have at most 576460752303423488 scores, but has"),
        (
            ["bench", "--batch", "1", "--heads", "1", "--head-dim", "1", "--q", "10000000", "--no-compile", "--no-memory"],
            "yours in float32 must fit into the memory of cpu, but: ",
        ),
    ],
)
def test_messages(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_dtype_is_offered(dtype, capsys):
    assert dtype in DTYPES
    assert cli.main(["explain", *SMALL, "--device", "sm_90", "--dtype", dtype]) == 0
    assert f" {dtype}, batch 1" in capsys.readouterr().out
    assert cli.main(["bench", *SMALL, "--no-compile", "--no-memory", "--repeat", "1", "--dtype", dtype]) == 0
    printed = capsys.readouterr()
    assert f"\n{dtype}, batch 1" in printed.out
    assert "failed" not in printed.out
    for command in ("explain", "bench"):
        assert cli.main([command, "--help"]) == 0
        assert dtype in capsys.readouterr().out
