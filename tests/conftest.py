# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch


def devices() -> list[str]:
    """The devices of this machine that the installed library has kernels for."""
    found = ["cpu"]
    forward = "torch_gated_attn::_gated_attention_forward"
    if torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(forward, "CUDA"):
        found.append("cuda")
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        import torch_gated_attn  # noqa: F401  # registers the operators that devices() asks about

        metafunc.parametrize("device", devices())


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
