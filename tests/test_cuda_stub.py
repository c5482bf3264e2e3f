# SPDX-License-Identifier: BSD-3-Clause
"""On which device and stream the CUDA kernels are launched, without a GPU: cuda_stub/runtime.cpp pretends to have two.

Where the library was built with the CUDA kernels their launches are watched, elsewhere its launcher is compiled without
them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_stub import build

from torch_gated_attn import _C

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a build without CUDA"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the headers of the CUDA toolkit, which nvcc finds"),
]


def test_launches_go_to_the_tensors_device_and_its_current_stream():
    runtime = str(build.runtime())
    command = [sys.executable, str(Path(build.__file__).with_name("calls.py")), runtime]
    if _C.cuda_version is None:
        command.append(str(build.launcher()))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "LD_PRELOAD": runtime}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [
        f"device {device}, {stream}: []" for device in (0, 1) for stream in ("the default stream", "a stream of its own")
    ]
