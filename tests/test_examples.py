# SPDX-License-Identifier: BSD-3-Clause
"""The demo runs at a tiny size; its data and its own checks are sound."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def evoformer(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return pytest.importorskip("evoformer.train")


@pytest.fixture
def data(evoformer):
    return pytest.importorskip("evoformer.data")


def test_demo_runs_and_agrees(tmp_path):
    plot = tmp_path / "plot.png"
    command = [sys.executable, str(EXAMPLES / "evoformer_demo.py"), "--quick", "--output", str(plot)]
    one_thread = dict(os.environ, OMP_NUM_THREADS="1")  # as fast at this size, and steady where cores are shared
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=one_thread)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("time per step", "peak extra memory", "loss, last step", "held-out accuracy", "step 1, loss"):
        assert line in done.stdout
    assert "VIOLATED" not in done.stdout
    assert plot.stat().st_size > 10_000


def test_alignment_is_the_published_one(data):
    train, held_out = data.load_family()
    assert train.shape == (32, 419)
    assert held_out.shape == (6, 419)
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in held_out.tolist()}


def test_examples_repeat_and_hide_residues_only(data):
    train, held_out = data.load_family()
    one, same = (data.training_example(train, 3, 192) for _ in range(2))
    assert torch.equal(one.tokens, same.tokens)
    assert torch.equal(one.labels, same.labels)
    hidden = one.labels != data.IGNORE
    assert torch.equal(hidden, one.tokens == data.MASKED)
    assert not (one.labels[hidden] == data.GAP).any()
    assert one.live[hidden].all()
    for example in data.held_out_examples(train, held_out, 192):
        assert not (example.labels[len(held_out) :] != data.IGNORE).any()


def test_a_wrong_attention_fails_the_checks(evoformer, data):
    agreement = pytest.importorskip("evoformer.agreement")
    attention = pytest.importorskip("evoformer.attention")

    class BiasOffByAThousandth(attention.PlainAttention):
        def forward(self, q_data, m_data=None, mask=None, bias=None):
            return super().forward(q_data, m_data, mask, None if bias is None else bias * (1 + 1e-3))

    train, _ = data.load_family()
    plain, wrong = evoformer.build_runs({"plain": attention.PlainAttention, "wrong": BiasOffByAThousandth})
    checks = agreement.check_first_step(plain.model, wrong.model, data.training_example(train, 0, 24))
    assert not checks[1].passed
