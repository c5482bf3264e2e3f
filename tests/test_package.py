# SPDX-License-Identifier: BSD-3-Clause
"""What importing the package does, and what it says when that fails."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_gated_attn
from torch_gated_attn import _C, _load


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)


def test_public_names():
    assert sorted(torch_gated_attn.__all__) == [
        "Explanation",
        "GatedAttention",
        "OPS_TO_SAVE",
        "__version__",
        "explain",
        "gate_output",
        "gated_attention",
        "gated_attention_with_lse",
        "reference",
    ]
    for name in torch_gated_attn.__all__:
        assert hasattr(torch_gated_attn, name), name


def test_operators_that_are_already_registered_are_used():
    """A second copy of the library would end the process."""
    program = f"""
import torch
torch.ops.load_library({_C.__file__!r})
import torch_gated_attn
torch_gated_attn._load.load()
x = torch.ones(1, 2, 3)
print(torch_gated_attn.gated_attention(x, x, x).shape)
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 2, 3])"


def test_import_is_quiet_and_needs_no_numpy():
    program = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
import torch_gated_attn
x = torch.ones(2, 8)
torch_gated_attn.GatedAttention(8, 2)(x)
"""
    done = run(program)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "torch_gated_attn" not in done.stderr


def test_works_without_a_visible_device():
    """As on a machine without a GPU or a driver: nothing is asked of CUDA at import or by a call on the CPU."""
    program = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
import torch_gated_attn
x = torch.ones(1, 2, 3)
assert torch.equal(torch_gated_attn.gated_attention(x, x, x), x)
assert not torch.cuda.is_initialized()
"""
    done = run(program)
    assert done.returncode == 0, done.stderr


def import_patched(folder: Path, **patches: bytes) -> str:
    """The last line of what importing a copy says whose library has some bytes replaced by as many others."""
    copy = folder / "torch_gated_attn"
    shutil.copytree(Path(torch_gated_attn.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    library = copy / Path(_C.__file__).name
    content = library.read_bytes()
    for old, new in patches.items():
        assert len(old) == len(new)
        assert old.encode() in content
        content = content.replace(old.encode(), new)
    library.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", "import torch_gated_attn"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


CUDA = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
WHEEL = f"torch-gated-attn=={torch_gated_attn.__version__}+torch{'.'.join(torch.__version__.split('.')[:2])}.{CUDA}"
REBUILD = "rebuild with `pip install --no-build-isolation --force-reinstall --no-deps .` in its source directory"


def test_library_of_another_torch(tmp_path):
    """As after a change of torch: a function that the library calls is not there."""
    said = import_patched(tmp_path, findSchemaOrThrow=b"findSchemaOrThrew")
    built, running, remedy = map(re.escape, (_C.torch_version, torch.__version__, f"take the wheel {WHEEL}, or {REBUILD}"))
    assert re.fullmatch(
        rf"ImportError: torch_gated_attn was built with torch {built} and cannot be loaded into torch {running} "
        rf"\(.*undefined symbol: \w*findSchemaOrThrew\w*\); {remedy}",
        said,
    ), said


def test_library_of_another_torch_that_loads(tmp_path):
    older = "9" * len(_C.torch_version)
    said = import_patched(tmp_path, **{_C.torch_version: older.encode()})
    assert said == (
        f"ImportError: torch_gated_attn was built with torch {older} and cannot be loaded into torch {torch.__version__} "
        f"(minor versions of PyTorch are not binary compatible); take the wheel {WHEEL}, or {REBUILD}"
    )


def test_library_that_is_missing(monkeypatch):
    monkeypatch.setattr(_load.torch, "ops", type("Ops", (), {"torch_gated_attn": object()}))
    monkeypatch.setitem(sys.modules, "torch_gated_attn._C", None)
    monkeypatch.delattr(torch_gated_attn, "_C")
    with pytest.raises(ImportError, match=r"^torch_gated_attn was not built: its extension module _C is missing; rebuild "):
        _load.load()
