# SPDX-License-Identifier: BSD-3-Clause
"""Every module with its projections split over two gloo processes by `parallelize_module` equals the whole module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modules
import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process computed, all cases in one start."""
    from tensor_parallel import PROCESSES, process

    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", modules.MODULES)
def test_results_and_gradients(results, name):
    for rank, result in enumerate(results):
        assert result["differences"][name] == [], f"process {rank}"


REFUSED = {
    "bias": "bias must have the 2 heads of 4 that this process's projections give, or 1, but has 4",
    "mask": "mask must have the 2 heads of 4 that this process's projections give, or 1, but has 4",
    "pair bias": "bias must have the 2 heads of 4 that this process's projections give, or 1, but has 4",
    "key": "linear_k must be split over processes as linear_q is, which gives 4 of 4 heads, but gives 2",
}


@pytest.mark.parametrize("what", REFUSED)
def test_heads_of_another_process_are_refused(results, what):
    for result in results:
        assert result["refusals"][what] == REFUSED[what]


def test_split_layers_start_as_whole_ones(results):
    limit = (6 / (modules.MSA_DIM * (modules.HEADS + modules.MSA_DIM // modules.HEADS))) ** 0.5
    for result in results:
        start = result["resets"]
        for name in ("linear_q.weight", "linear_k.weight", "linear_v.weight"):
            assert 0.95 * limit < start[name].abs().max() <= limit, name
        assert (start["linear_o.weight"] == 0).all()
        assert (start["linear_g.bias"] == 1).all()
