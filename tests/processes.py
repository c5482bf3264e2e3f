# SPDX-License-Identifier: BSD-3-Clause
"""Starts gloo processes for a test, all its cases in one start, and brings home what each case returned."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Cases = Mapping[str, Callable[[], Any]]


def start(cases_of: Callable[[int], Cases], count: int, folder: Path, simulated: int = 0) -> list[dict[str, Any]]:
    """For every process: by case, what it returned, or the text of what it raised. `cases_of` is called with the rank.

    `simulated`: that many ranks in every process, for LocalTensorMode.
    """
    # One server imports, once for all files, and every process is its fork.
    multiprocessing.set_forkserver_preload(["pytest", "torch_gated_attn.distributed", "torch.distributed.tensor.debug"])
    arguments = count, str(folder), cases_of, simulated
    torch.multiprocessing.start_processes(_process, arguments, nprocs=count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, count: int, folder: str, cases_of: Callable[[int], Cases], simulated: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of this machine need not resolve
    # A case that fails on one process leaves the others waiting: not for half an hour.
    timeout = datetime.timedelta(seconds=60)
    where = f"file://{folder}/rendezvous"
    if simulated:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=simulated)
    else:
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count, timeout=timeout)
    try:
        torch.save({name: _attempt(case) for name, case in cases_of(rank).items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _attempt(case: Callable[[], Any]) -> Any:
    torch.manual_seed(0)  # the same on every process
    try:
        return case()
    except Exception:
        return traceback.format_exc()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape:
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() if b.numel() else 0.0


def no_failures(results: list[dict[str, Any]], name: str) -> None:
    """Every process returned an empty text for the case."""
    texts = [f"process {rank}: {result[name]}" for rank, result in enumerate(results) if result[name]]
    assert not texts, "\n".join(texts)
