# SPDX-License-Identifier: BSD-3-Clause
"""docs/distributed.md runs on two processes, and its tables are those of its formulas."""

from __future__ import annotations

import importlib.util
import os
import socket

import pytest
import torch
from pages import ROOT, blocks

PAGE, COUNT = "docs/distributed.md", 2


def page(rank: int, port: int) -> None:
    """As torchrun starts it."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(COUNT), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    exec(compile("\n".join(blocks(PAGE)), PAGE, "exec"), {"__name__": "__main__"})


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)
def test_page_runs_on_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    assert len(blocks(PAGE)) >= 6
    torch.multiprocessing.start_processes(page, (port,), nprocs=COUNT, start_method="forkserver")


def test_tables_are_those_of_the_formulas():
    spec = importlib.util.spec_from_file_location("distributed_on_paper", ROOT / "benchmarks/distributed_on_paper.py")
    paper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper)
    text = (ROOT / PAGE).read_text()
    for table in paper.tables().split("\n\n"):
        assert table in text
    assert paper.efficiency(8192, 64, "axial") > paper.efficiency(4096, 64, "axial")
    # one device computes all the time
    assert paper.efficiency(4096, 1, "axial") == pytest.approx(1)
