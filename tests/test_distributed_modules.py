# SPDX-License-Identifier: BSD-3-Clause
"""Modules on four processes equal one: a pair block by axial parallelism and by a grid, heads, sharded parameters."""

from __future__ import annotations

import pytest
import torch
from processes import start

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)

COUNT = 4


def cases_of(rank: int) -> dict:
    from distributed_modules import module_cases

    return module_cases(COUNT)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return start(cases_of, COUNT, tmp_path_factory.mktemp("processes"))


def test_four_processes_equal_one(results):
    failures = {(rank, name): text for rank, result in enumerate(results) for name, text in result.items() if text}
    assert not failures, failures
    from distributed_modules import LINEAR_TAKES_INNER_SHARDS

    assert len(results[0]) == (13 if LINEAR_TAKES_INNER_SHARDS else 4)
