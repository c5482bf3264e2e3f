# SPDX-License-Identifier: BSD-3-Clause
"""Training on two gloo processes equals training on one: data parallel, fully sharded, and parallel over heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_training import PROCESSES, SCENARIOS, make_model, one_process, one_process_attention, parameters, process
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each process computed, all scenarios in one start."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_equal_one(results, scenario):
    training = scenario != "tensor parallel"
    expected = one_process() if training else one_process_attention()
    start = parameters(make_model()) if training else dict.fromkeys(expected, torch.tensor(0.0))
    for rank in range(PROCESSES):
        assert results[rank][scenario].keys() == expected.keys()
        for name, value in expected.items():
            assert not torch.equal(value, start[name].expand_as(value)), f"{name} was not trained: nothing was compared"
            torch.testing.assert_close(
                results[rank][scenario][name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
            )
