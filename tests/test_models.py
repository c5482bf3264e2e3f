# SPDX-License-Identifier: BSD-3-Clause
"""Whole models with their attention replaced: a block of OpenFold's interface, and those of transformers if installed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_gated_attn.integrations import patch

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    one_thread = dict(os.environ, OMP_NUM_THREADS="1")  # as fast at this size, and steady where cores are shared
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, env=one_thread)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_and_gradients(model: nn.Module, loss) -> dict[str, torch.Tensor]:
    value = loss(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return {"loss": value.detach(), **{name: g for name, g in zip(names, grads, strict=True) if g is not None}}


def test_benchmark_of_models(tmp_path):
    file = tmp_path / "models.json"
    options = ("--length", "12", "--repeat", "1", "--no-memory", "--json", str(file))
    out = run(str(ROOT / "benchmarks" / "models.py"), "--models", "evoformer", *options)
    assert "evoformer, length 12: " in out
    (row,) = json.loads(file.read_text())["models"]
    assert abs(row["original"]["loss"] - row["replaced"]["loss"]) < 1e-5 * row["original"]["loss"]


def test_evoformer_block_in_float64(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    block = pytest.importorskip("openfold_block")
    model = block.EvoformerBlock().double()
    msa, pair = torch.randn(5, 9, block.MSA_DIM).double(), torch.randn(9, 9, block.PAIR_DIM).double()
    masks = torch.ones(5, 9).double(), torch.ones(9, 9).double()
    masks[0][1:, 7:] = masks[1][7:, 1:] = 0  # every row and column keeps a key; one that keeps none differs in float64

    def loss(m):
        return sum(x.square().mean() for x in m(msa, pair, *masks))

    replaced = copy.deepcopy(model)
    assert [m.path for m in patch(replaced).replaced] == ["row.mha", "column.mha", "starting.mha", "ending.mha"]
    results, expected = losses_and_gradients(replaced, loss), losses_and_gradients(model, loss)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-8, atol=1e-12, msg=name)


def test_folding_trunk_of_esmfold():
    esmfold = pytest.importorskip("transformers.models.esm.modeling_esmfold")
    from transformers.models.esm.configuration_esm import TrunkConfig

    structure = {"sequence_dim": 16, "pairwise_dim": 8, "num_blocks": 1, "num_heads_ipa": 2, "resnet_dim": 8}
    sizes = {"sequence_head_width": 8, "pairwise_head_width": 4, "chunk_size": None}
    config = TrunkConfig(num_blocks=2, sequence_state_dim=32, pairwise_state_dim=16, structure_module=structure, **sizes)
    model = esmfold.EsmFoldingTrunk(config).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # some start at 0
        parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.2
    length, mask = 11, torch.ones(2, 11, dtype=torch.long)
    sequence, pair = torch.randn(2, length, 32).double(), torch.randn(2, length, length, 16).double()
    residues, positions = torch.randint(0, 20, (2, length)), torch.arange(length).expand(2, length)

    def loss(trunk):
        out = trunk(sequence, pair, residues, positions, mask, no_recycles=0)
        return out["s_s"].square().mean() + out["s_z"].square().mean()

    replaced = copy.deepcopy(model)
    report = patch(replaced)
    assert len(report.replaced) == 6
    assert [(m.path, m.note) for m in report.left] == [("structure_module.ipa", "no adapter for this class")]
    results, expected = losses_and_gradients(replaced, loss), losses_and_gradients(model, loss)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-7, atol=1e-10, msg=name)

    # In chunks, and with padding: the residues that exist agree.
    mask[1, 7:] = 0
    for chunk_size in (None, 4):
        for trunk in (model, replaced):
            trunk.set_chunk_size(chunk_size)
        with torch.no_grad():
            a, b = (trunk(sequence, pair, residues, positions, mask, no_recycles=1)["s_s"] for trunk in (model, replaced))
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()])
        assert b.isfinite().all()


def test_qwen3_next_generates_the_same(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from qwen3_next_tiny import build_model

    model = build_model().eval()
    tokens, mask = torch.randint(1, 256, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0  # padded on the left
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        replaced = copy.deepcopy(model)
        assert len(patch(replaced).replaced) == 1
        with torch.no_grad():
            a, b = (m(tokens, attention_mask=mask).logits[mask.bool()] for m in (model, replaced))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
            a, b = (m.generate(tokens, **options) for m in (model, replaced))
        assert torch.equal(a, b)
        assert a.size(1) == 26


def test_example_of_qwen3_next():
    pytest.importorskip("transformers")
    out = run(str(ROOT / "examples" / "qwen3_next_tiny.py"), "--steps", "3", "--length", "32")
    assert "1 attention module replaced, 0 left" in out
    assert "loss curves agree" in out
