# SPDX-License-Identifier: BSD-3-Clause
"""A pair block on several devices: dynamic axial parallelism, and a grid of tiles with a ring over the keys.

    torchrun --nproc-per-node 4 examples/axial_parallelism.py

The pair representation [B, N, N, C] is the memory of a structure model. Axial parallelism splits its rows for triangle
attention around the starting node, whose rows need nothing of each other but the bias, and its columns for the ending node;
in between it is turned by one all_to_all. A grid splits both at once and is never turned: keys travel in a ring, which pays
where the bias, H numbers for every pair, is too large to be whole on every device.

Prints how far both are from one process, forward and in every gradient, and how often they communicate.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from torch_gated_attn.alphafold import TriangleAttention
from torch_gated_attn.distributed import ring_gated_attention


class PairBlock(nn.Module):
    """Triangle attention around both nodes and a transition, each added to the pair representation."""

    def __init__(self, channels: int, heads: int, **options) -> None:
        super().__init__()
        self.start = TriangleAttention(channels, heads, starting=True, zero_init=False, **options)
        self.end = TriangleAttention(channels, heads, starting=False, zero_init=False, **options)
        self.transition = nn.Sequential(
            nn.LayerNorm(channels, **options),
            nn.Linear(channels, 4 * channels, **options),
            nn.ReLU(),
            nn.Linear(4 * channels, channels, **options),
        )

    def forward(self, pair: Tensor, mask: Tensor) -> Tensor:
        pair = pair + self.start(pair, mask)
        pair = pair + self.end(pair, mask)
        return pair + self.transition(pair)


def axial(block: PairBlock, pair: DTensor, mask: DTensor) -> DTensor:
    """`pair` comes with its rows split and leaves with its columns split, ready for a block that begins at the other node.

    The module is the one of a single process. Its bias comes out split and is gathered, which DTensor does by itself."""
    pair = pair + block.start(pair, mask)
    columns = [Shard(2)]
    pair, mask = pair.redistribute(placements=columns), mask.redistribute(placements=columns)  # the turn
    pair = pair + block.end(pair, mask)
    return pair + block.transition(pair)


def grid(block: PairBlock, pair: DTensor, mask: DTensor) -> DTensor:
    """`pair` in tiles: rows split over the mesh's first dimension, columns over its second."""
    pair = pair + _ring_node(block.start, pair, mask, keys_over=1)
    pair = pair + _ring_node(block.end, pair, mask, keys_over=0)
    return pair + block.transition(pair)


def _ring_node(node: TriangleAttention, pair: DTensor, mask: DTensor, keys_over: int) -> DTensor:
    """TriangleAttention.forward with its keys split over one mesh dimension."""
    attention = node.attention
    if not node.starting:
        pair, mask = pair.transpose(1, 2), mask.transpose(1, 2)
    rows = node.query_norm(pair)
    heads = lambda x: x.unflatten(-1, (attention.num_heads, -1)).transpose(-2, -3)  # noqa: E731  # [B, N, H, N, D]
    query, key, value, gate = (
        heads(linear(rows)) for linear in (attention.linear_q, attention.linear_k, attention.linear_v, attention.linear_g)
    )
    # A tile of the bias has its queries where the rows are split. They go where the queries of a row are: each device
    # gets the part of the bias that it needs, [B, H, N / P, N].
    placements = [Replicate(), Replicate()]
    placements[keys_over] = Shard(1)
    bias = node.pair_bias(rows).redistribute(placements=placements)
    bias = bias.movedim(-1, -3).unsqueeze(-4)
    out = ring_gated_attention(query, key, value, gate, bias, mask[..., None, None, :], masked_rows="mean")
    result = attention.linear_o(out.transpose(-2, -3).flatten(-2))
    return result if node.starting else result.transpose(1, 2)


def compare(run, mesh: DeviceMesh, placements: list, size: int = 16, channels: int = 16, heads: int = 4):
    """The largest relative error against one process, of the result and all gradients, and the collectives each way."""
    torch.manual_seed(0)
    whole = PairBlock(channels, heads, dtype=torch.float64)
    torch.manual_seed(0)
    block = distribute_module(PairBlock(channels, heads, dtype=torch.float64), mesh)
    pair, cotangent = (torch.randn(1, size, size, channels, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(1, size, size) > 0.2
    leaf = pair.clone().requires_grad_()
    expected = whole(leaf, mask)
    expected.backward(cotangent)

    spread, spread_mask = (distribute_tensor(t, mesh, placements) for t in (pair, mask))
    spread.requires_grad_()
    with CommDebugMode() as forward:
        out = run(block, spread, spread_mask)
    spread_cotangent = distribute_tensor(cotangent, mesh, out.placements)
    with CommDebugMode() as backward:
        out.backward(spread_cotangent)
    pairs = [(out, expected), (spread.grad, leaf.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(block.parameters(), whole.parameters(), strict=True)]
    error = max(((a.full_tensor() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return error, forward.get_comm_counts(), backward.get_comm_counts()


def main() -> None:
    dist.init_process_group("gloo")
    count = dist.get_world_size()
    line, tiles = init_device_mesh("cpu", (count,)), init_device_mesh("cpu", (2, count // 2))
    for name, result in (
        ("axial", compare(axial, line, [Shard(1)])),
        ("grid", compare(grid, tiles, [Shard(1), Shard(2)])),
    ):
        error, *counts = result
        if dist.get_rank() == 0:
            shown = [{str(op).rsplit(".", 1)[-1]: n for op, n in c.items()} for c in counts]
            print(f"{name}: largest relative error {error:.1e}; forward {shown[0]}, backward {shown[1]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
