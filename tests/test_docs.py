# SPDX-License-Identifier: BSD-3-Clause
"""The documentation is true where a test can tell: examples run, commands parse, named tests exist, the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks, is_for_several_processes, makes_package, run_example

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
ALONE = [page for page in PAGES if not is_for_several_processes(page)]
EXAMPLES = [(page, block) for page in ALONE for block in blocks(page) if not makes_package(block)]
SHELL = re.compile(r"^( *)```sh\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NAMED_TEST = re.compile(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`")


def label(text: str) -> str:
    return text.strip().split("\n")[-1][:40]


def test_pages_have_examples():
    assert len(blocks("README.md")) >= 3
    assert {"docs/index.md", "docs/pytorch.md", "docs/integrations.md", "docs/cookbook/alphafold2.md"} <= {
        page for page, _ in EXAMPLES
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("page", "block"), EXAMPLES, ids=label)
def test_example(page, block, tmp_path, monkeypatch):
    if "torch_gated_attn.onnx" in block:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    run_example(page, block)


@pytest.mark.parametrize("page", PAGES)
def test_shell_commands_parse(page):
    for _, script in SHELL.findall((ROOT / page).read_text()):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (script, done.stderr)
        for target in re.findall(r"^ *make (\w+)", script, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="the command line needs typer")
def test_command_lines_have_options_that_exist():
    from typer.main import get_command

    from torch_gated_attn.cli.app import app

    commands = get_command(app).commands
    lines = [
        line
        for page in PAGES
        for line in re.findall(r"python -m torch_gated_attn ([\w][^\n`#;]*)", (ROOT / page).read_text())
    ]
    assert len(lines) >= 8
    for line in lines:
        name, *arguments = line.split()
        known = {option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {argument for argument in arguments if argument.startswith("--")} <= known, line


def test_tests_that_pages_name_exist():
    pages = [page for page in PAGES if page != "docs/reliability.md"]  # test_reliability_table.py has that one
    named = {test for page in pages for test in NAMED_TEST.findall((ROOT / page).read_text())}
    assert len(named) >= 20
    missing = []
    for file, function in sorted(named):
        path = ROOT / "tests" / file
        if not path.exists() or (function and not re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE)):
            missing.append(f"{file}::{function}")
    assert not missing


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml")),
    reason="the site needs the extra docs",
)
def test_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    index = (tmp_path / "site/index.html").read_text()
    assert "<math" in index
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', page.read_text()), page


def test_formulas_of_docstrings_become_markdown():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs/hooks/docstrings.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = """See :func:`~torch.add`.

.. math::
    a = b

And ``c``.

.. code-block:: python

    import d

    e()

.. math:: x &= y \\\\
    z &= 1
"""
    plain = hook.markdown(text)
    assert "See `torch.add`." in plain
    assert "$$\na = b\n$$" in plain
    assert "And `c`." in plain
    assert "```python\nimport d\n\ne()\n```" in plain
    assert "\\begin{align*}\nx &= y \\\\\nz &= 1\n\\end{align*}" in plain
