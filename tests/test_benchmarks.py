# SPDX-License-Identifier: BSD-3-Clause
"""The benchmarks run on tiny shapes; no time is asserted."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from torch_gated_attn._bench import peers, peers_cuda, workloads

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

TINY = {
    "workloads": [
        {
            "id": "T1",
            "name": "pair bias",
            "batch": 5,
            "cpu_batch": 3,
            "heads": 2,
            "q": 16,
            "k": 16,
            "head_dim": 8,
            "bias": "[1,H,Q,K] grad",
            "mask": "[B,1,1,K]",
            "dtypes": ["float32", "bfloat16"],
        },
        {
            "id": "P1",
            "name": "two batch dimensions",
            "batch": [4, 4],
            "cpu_batch": [4, 2],
            "heads": 2,
            "q": 16,
            "k": 16,
            "head_dim": 8,
            "bias": "[4,1,H,Q,K] grad",
            "mask": "[4,B,1,1,K]",
            "dtypes": ["float32"],
        },
        {
            "id": "O1",
            "name": "fully masked rows",
            "batch": 7,
            "cpu_batch": 7,
            "heads": 2,
            "q": 13,
            "k": 13,
            "head_dim": 8,
            "bias": "[1,H,Q,K] grad",
            "mask": "[B,1,1,K], some rows all False",
            "dtypes": ["float32"],
        },
        {
            "id": "P2",
            "name": "no gate",
            "batch": 6,
            "cpu_batch": 6,
            "heads": 2,
            "q": 1,
            "k": 4,
            "head_dim": 8,
            "bias": None,
            "mask": "[1,1,1,K]",
            "gate": None,
            "dtypes": ["float32"],
        },
        {
            "id": "L1",
            "name": "grouped",
            "batch": 1,
            "cpu_batch": 1,
            "heads": 4,
            "kv_heads": 2,
            "q": 16,
            "k": 16,
            "head_dim": 16,
            "bias": None,
            "mask": "key padding",
            "dtypes": ["float32"],
        },
    ]
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=dict(os.environ, MPLBACKEND="Agg"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    files = ["--json", str(folder / "results.json"), "--png", str(folder / "results.png")]
    done = run(
        "--workload-file", str(folder / "tiny.json"), "--repeat", "2", "--no-compile", "--memory", "--threads", "1", *files
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text()), folder, done.stdout


def test_every_workload_dtype_and_direction_is_timed(results):
    document, _, printed = results
    timed = {(c["workload"], c["dtype"], c["direction"]) for c in document["comparisons"]}
    expected = {(w["id"], d, r) for w in TINY["workloads"] for d in w["dtypes"] for r in ("forward", "forward+backward")}
    assert timed == expected
    for comparison in document["comparisons"]:
        assert set(comparison["paths"]) == {"operator", "eager", "sdpa"}
        assert all("error" not in path for path in comparison["paths"].values()), comparison
        assert comparison["workload"] in printed


def test_the_paths_compute_the_same(results):
    for case, by_path in results[0]["largest_relative_difference_from_float64"].items():
        limit = 0.05 if "bfloat16" in case else 1e-4
        for path, differences in by_path.items():
            assert max(differences.values()) < limit, (case, path, differences)


def test_memory_is_measured_per_path(results):
    document, _, _ = results
    assert set(document["memory_mib"]["paths"]) == {"operator", "eager", "sdpa"}
    assert document["memory_mib"]["needed"] > 0


def test_where_and_how_is_recorded(results):
    machine = results[0]["machine"]
    assert machine["threads"] == 1
    assert "run.py" in machine["command"]
    assert {"cpu", "cpu_flags", "date", "instruction_set", "versions", "commit"} <= set(machine)


def test_plot_is_written(results):
    assert (results[1] / "results.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "Z9"], "--workloads must be among T1, T2"),
        (["--dtypes", "float8"], "--dtypes must be among float32, bfloat16, float16, float64, got float8"),
        (["--repeat", "0"], "--repeat and --threads must be at least 1"),
        (["--device", "cuda", "--memory"], "--peak and --memory measure the CPU, not --device cuda"),
    ],
)
def test_wrong_options_are_explained(arguments, message):
    done = run(*arguments)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    done = run("--device", "cuda")
    assert done.returncode != 0
    assert done.stderr.endswith("--device cuda needs a GPU, but torch finds none\n")


def triangle_attention_like_trifast(query, key, value, bias, left_out):
    """[H, rows, N, D], bias [H, N, N], left_out [rows, N]."""
    scores = query @ key.transpose(-1, -2) * query.size(-1) ** -0.5 + bias[:, None]
    return scores.masked_fill(left_out[None, :, None], -1e9).softmax(-1) @ value


@pytest.mark.parametrize("entry", TINY["workloads"], ids=lambda entry: entry["id"])
def test_peers_of_a_gpu_compute_the_same_on_a_cpu(entry, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"workloads": [entry]}))
    (workload,) = workloads.load(tmp_path / "one.json")
    tensors = [None if t is None else t.detach() for t in workloads.make_inputs(workload, torch.float32).tensors]
    paths = {
        "sdpa": peers_cuda.with_one_batch_dimension(peers.sdpa),
        "flex": peers_cuda.flex(peers.MASKED_LOGIT, compiled=False),
    }
    if entry["id"] in ("T1", "O1"):
        paths["trifast"] = peers_cuda.trifast(triangle_attention_like_trifast)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention recommends its compiler
        expected = peers.eager(*tensors)
        for name, path in paths.items():
            torch.testing.assert_close(path(*tensors), expected, msg=lambda text, name=name: f"{name}: {text}")


def test_shares_count_attended_keys_only(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    share = pytest.importorskip("share")
    inputs = workloads.make_inputs(share.TRIANGLE, workloads.DTYPES["float32"])
    live = round(256 * (1 - workloads.MASKED_SHARE))
    assert share.TRIANGLE.attended_pairs(inputs.mask) == 16 * 4 * 256 * live


def test_every_listed_workload_has_consistent_shapes():
    for workload in workloads.load():
        row = workload.cut(1)
        inputs = workloads.make_inputs(row, workloads.DTYPES["float32"])
        scores = [*row.batch, row.heads, row.q_len, row.k_len]
        assert inputs.mask.expand(scores).any(), workload.name
        assert workload.bias_shape is None or inputs.bias.expand(scores).shape[-1] == row.k_len
        assert workload.gated == (inputs.gate is not None)
