# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch


def devices() -> list[str]:
    """The devices of this machine that the installed library has kernels for."""
    from torch_gated_attn import _C

    return ["cpu", "cuda"] if torch.cuda.is_available() and _C.cuda_version is not None else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


@pytest.fixture(scope="session")
def library():
    """The CUDA kernels compiled for the host."""
    from cuda_emulator import build, harness

    return harness.load(build.build())


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
