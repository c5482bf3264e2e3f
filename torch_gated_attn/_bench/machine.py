# SPDX-License-Identifier: BSD-3-Clause
"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import _C, __version__

_ROOT = Path(__file__).resolve().parents[2]  # of the repository, if this is not an installed copy


def instruction_set() -> str:
    """What the operator's CPU kernels run on; TORCH_GATED_ATTN_CPU_CAPABILITY lowers it."""
    name: str = _C.cpu_capability()
    return name


def why_no_gpu() -> str | None:
    """What a benchmark on a GPU lacks here."""
    if not torch.cuda.is_available():
        return "a GPU, but torch finds none"
    return None if _C.cuda_version else "a build with CUDA kernels, but torch_gated_attn was built without"


def gpus() -> list[dict[str, Any]]:
    """Those that PyTorch can use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": properties.total_memory // 2**20,
            "cuda": torch.version.cuda,
        }
        for properties in map(torch.cuda.get_device_properties, range(count))
    ]


def describe(device: str = "cpu") -> dict[str, Any]:
    cpu = _cpu_info()
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "gpu": gpus()[torch.cuda.current_device()] if device == "cuda" else None,
        "cpu": cpu.get("model name", platform.processor() or "unknown"),
        "cpu_family_model_stepping": [cpu.get(key) for key in ("cpu family", "model", "stepping")],
        "cpu_flags": cpu.get("flags", ""),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_gated_attn": __version__,
        },
        "build": {
            "torch": _C.torch_version,
            "compiler": _C.compiler,
            "cuda": _C.cuda_version,
            "instruction_sets": list(_C.cpu_capabilities),
        },
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("TORCH_GATED_ATTN_", "OMP_", "MKL_"))},
    }


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _commit() -> str:
    if not (_ROOT / "csrc").exists():
        return "unknown"  # an installed copy: a repository around it is another one
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # a source archive
