# SPDX-License-Identifier: BSD-3-Clause
"""The Python examples of the README and of docs/pytorch.md run as they stand."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, blocks, makes_package, run_example

PAGES = ("README.md", "docs/pytorch.md")
EXAMPLES = [(page, block) for page in PAGES for block in blocks(page) if not makes_package(block)]


def test_pages_have_examples():
    assert len(blocks("README.md")) >= 3
    assert len(blocks("docs/pytorch.md")) >= 9


def test_tests_named_in_the_table_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs/pytorch.md").read_text()))
    assert named
    assert not {name for name in named if not (ROOT / "tests" / name).exists()}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("page", "block"), EXAMPLES, ids=lambda text: text.split("\n")[-2][:40] if "\n" in text else text)
def test_example(page, block, tmp_path, monkeypatch):
    if "torch_gated_attn.onnx" in block:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    run_example(page, block)
