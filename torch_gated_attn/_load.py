# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled operators, once per process.

A second copy of the library would end the process inside PyTorch's registration, where Python cannot catch it, so an
operator that a C++ program or `torch.ops.load_library` has already registered is used as it is.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

from ._version import __version__

_REBUILD = "rebuild with `pip install --no-build-isolation --force-reinstall --no-deps .` in its source directory"


def load() -> None:
    if hasattr(torch.ops.torch_gated_attn, "gated_attention"):
        return
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(_explain(error)) from error
    # It may load all the same: not every change of PyTorch's C++ classes changes the name of a function.
    if _minor_version(_C.torch_version) != _minor_version(torch.__version__):
        raise ImportError(_mismatch(_C.torch_version, "minor versions of PyTorch are not binary compatible"))


def _minor_version(version: str) -> list[str]:
    return version.split(".")[:2]


def _explain(error: ImportError) -> str:
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is None or spec.origin is None:
        return f"torch_gated_attn was not built: its extension module _C is missing; {_REBUILD}"
    # The library cannot be loaded, so what it was built with is read from the text that it carries for this purpose.
    built = re.search(rb"torch_gated_attn built with torch ([\w.+]+)", Path(spec.origin).read_bytes())
    return _mismatch(built.group(1).decode() if built else "an unknown version", error)


def _wheel() -> str:
    """The name of the wheel for the torch at hand; setup.py gives it."""
    cuda = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    return f"torch-gated-attn=={__version__}+torch{'.'.join(_minor_version(torch.__version__))}.{cuda}"


def _mismatch(built: str, why: object) -> str:
    return (
        f"torch_gated_attn was built with torch {built} and cannot be loaded into torch {torch.__version__} ({why}); "
        f"take the wheel {_wheel()}, or {_REBUILD}"
    )
