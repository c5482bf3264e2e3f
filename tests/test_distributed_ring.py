# SPDX-License-Identifier: BSD-3-Clause
"""Ring and split-key attention equal one process, on 2, 3 and 4 processes, and behave as operators of PyTorch."""

from __future__ import annotations

import functools
import platform
import shutil
from pathlib import Path

import pytest
import torch
from processes import start

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)

COUNT = 4
GROUPS = {"two a": [0, 2], "two b": [1, 3], "three": [1, 2, 3], "four": [0, 1, 2, 3], "one": [2]}


def cases_of(rank: int) -> dict:
    import torch.distributed as dist
    from distributed_operators import operator_cases
    from distributed_ring import ring_cases

    groups = {label: dist.new_group(ranks) for label, ranks in GROUPS.items()}
    own = {label: group for label, group in groups.items() if rank in GROUPS[label]}
    return {**ring_cases(own), **operator_cases(own)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return start(cases_of, COUNT, tmp_path_factory.mktemp("processes"))


def test_as_many_cases_as_promised(results):
    four = [name for name in results[0] if name.startswith("ring_gated_attention, four")]
    assert len(four) >= 26


def test_processes_together_equal_one(results):
    failures = {(rank, name): text for rank, result in enumerate(results) for name, text in result.items() if text}
    assert not failures, failures


def cases_on_emulated_kernels(library: Path, rank: int) -> dict:
    import torch.distributed as dist
    from distributed_ring import emulated_cases

    return emulated_cases(dist.group.WORLD, library)


@pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="the emulator needs g++ and switches stacks in x86-64 assembly",
)
def test_processes_together_equal_one_on_emulated_cuda_kernels(library, tmp_path):
    cases = functools.partial(cases_on_emulated_kernels, Path(library._name))
    for rank, result in enumerate(start(cases, 4, tmp_path)):
        assert len(result) == 12
        failures = {(rank, name): text for name, text in result.items() if text}
        assert not failures, failures
