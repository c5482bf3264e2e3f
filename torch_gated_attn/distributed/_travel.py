# SPDX-License-Identifier: BSD-3-Clause
"""Tensors that go from process to process round a group while each one computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

Arrival = Callable[[], list[Tensor]]


class Travel:
    """Sends to the next process of `group` and receives from the previous one."""

    def __init__(self, group: ProcessGroup) -> None:
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
        self.group, self.alone = group, len(ranks) == 1
        self.next, self.previous = ranks[(me + 1) % len(ranks)], ranks[me - 1]

    def start(self, tensors: Sequence[Tensor], positions: int) -> Arrival:
        """Begins to send; the call that it returns waits for what arrives, of `positions` positions (dimension -2).

        What is on its way lives until then, so of everything that travels two shards are alive at a time."""
        sent = [t.contiguous() for t in tensors]
        if self.alone:
            return lambda: sent
        arriving = [t.new_empty(*t.shape[:-2], positions, t.shape[-1]) for t in sent]
        transfers = [dist.P2POp(dist.isend, t, self.next, self.group) for t in sent]
        transfers += [dist.P2POp(dist.irecv, t, self.previous, self.group) for t in arriving]
        work = dist.batch_isend_irecv(transfers)

        def arrive() -> list[Tensor]:
            for w in work:
                w.wait()
            sent.clear()
            return arriving

        return arrive
