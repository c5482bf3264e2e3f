# SPDX-License-Identifier: BSD-3-Clause
"""A small Evoformer (Jumper et al. 2021, supplementary algorithm 6) that predicts hidden residues."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .data import GAP, NUM_TOKENS, Example

MSA_DIM, MSA_HEADS = 64, 8
PAIR_DIM, PAIR_HEADS = 32, 4  # head_dim 8 in both, as in AlphaFold's extra MSA stack
OUTER_DIM = 8
MAX_OFFSET = 32  # relative positions beyond this share one embedding, as in AlphaFold

AttentionFactory = Callable[[int, int], nn.Module]  # (q_dim, num_heads) -> module(q_data, m_data, mask, bias)


def transition(dim: int) -> nn.Sequential:
    # GELU where AlphaFold has ReLU: at a kink two roundings of one value can take different branches, and then the
    # gradients of two correct implementations are not comparable.
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


def pair_bias(project: nn.Linear, pair: Tensor) -> Tensor:
    return project(pair).permute(2, 0, 1)  # [L, L, C] -> [H, L, L], shared by all rows


class RowAttention(nn.Module):
    """Within each sequence, biased by the pair representation (algorithm 7)."""

    def __init__(self, attention: AttentionFactory) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(MSA_DIM)
        # Without a bias parameter: it would add one constant to every logit, which softmax ignores.
        self.pair_norm = nn.LayerNorm(PAIR_DIM, bias=False)
        self.pair_bias = nn.Linear(PAIR_DIM, MSA_HEADS, bias=False)
        self.attention = attention(MSA_DIM, MSA_HEADS)

    def forward(self, msa: Tensor, live: Tensor, pair: Tensor) -> Tensor:
        bias = pair_bias(self.pair_bias, self.pair_norm(pair))
        return self.attention(self.norm(msa), None, live[:, None, None, :], bias)


class ColumnAttention(nn.Module):
    """Within each column, over the sequences (algorithm 8)."""

    def __init__(self, attention: AttentionFactory) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(MSA_DIM)
        self.attention = attention(MSA_DIM, MSA_HEADS)

    def forward(self, msa: Tensor, live: Tensor) -> Tensor:
        columns = self.norm(msa.transpose(0, 1))
        return self.attention(columns, None, live.T[:, None, None, :]).transpose(0, 1)


class TriangleAttention(nn.Module):
    """Over the pairs that share a residue, biased by the third side of the triangle (algorithms 13 and 14)."""

    def __init__(self, attention: AttentionFactory, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.norm = nn.LayerNorm(PAIR_DIM)
        self.pair_bias = nn.Linear(PAIR_DIM, PAIR_HEADS, bias=False)
        self.attention = attention(PAIR_DIM, PAIR_HEADS)

    def forward(self, pair: Tensor, live: Tensor) -> Tensor:
        pair = self.norm(pair if self.starting else pair.transpose(0, 1))
        out = self.attention(pair, None, live[:, None, None, :], pair_bias(self.pair_bias, pair))
        return out if self.starting else out.transpose(0, 1)


class OuterProductMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(MSA_DIM)
        self.left = nn.Linear(MSA_DIM, OUTER_DIM)
        self.right = nn.Linear(MSA_DIM, OUTER_DIM)
        self.out = nn.Linear(OUTER_DIM * OUTER_DIM, PAIR_DIM)

    def forward(self, msa: Tensor, live: Tensor) -> Tensor:
        msa, weight = self.norm(msa), live.to(msa.dtype)[..., None]  # [S, L, 1]
        left, right = self.left(msa) * weight, self.right(msa) * weight
        outer = torch.einsum("sic,sjd->ijcd", left, right).flatten(-2)
        count = torch.einsum("sic,sjc->ij", weight, weight)[..., None]
        return self.out(outer / count.clamp(min=1))


class EvoformerBlock(nn.Module):
    def __init__(self, attention: AttentionFactory) -> None:
        super().__init__()
        self.outer_product_mean = OuterProductMean()
        self.triangle_start = TriangleAttention(attention, starting=True)
        self.triangle_end = TriangleAttention(attention, starting=False)
        self.pair_transition = transition(PAIR_DIM)
        self.row = RowAttention(attention)
        self.column = ColumnAttention(attention)
        self.msa_transition = transition(MSA_DIM)

    def forward(self, msa: Tensor, pair: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        # The pair track comes first, so that the last block's is not wasted: the prediction is read from the MSA.
        pair_live = live[0, :, None] & live[0, None, :]  # [L, L]
        pair = pair + self.outer_product_mean(msa, live)
        pair = pair + self.triangle_start(pair, pair_live)
        pair = pair + self.triangle_end(pair, pair_live)
        pair = pair + self.pair_transition(pair)
        msa = msa + self.row(msa, live, pair)
        msa = msa + self.column(msa, live)
        return msa + self.msa_transition(msa), pair


class Evoformer(nn.Module):
    def __init__(self, attention: AttentionFactory, blocks: int = 2) -> None:
        super().__init__()
        self.embed_msa = nn.Embedding(NUM_TOKENS, MSA_DIM)
        self.embed_pair = nn.Embedding(NUM_TOKENS * NUM_TOKENS, PAIR_DIM)
        self.embed_offset = nn.Embedding(2 * MAX_OFFSET + 1, PAIR_DIM)
        self.blocks = nn.ModuleList(EvoformerBlock(attention) for _ in range(blocks))
        self.head = nn.Sequential(nn.LayerNorm(MSA_DIM), nn.Linear(MSA_DIM, GAP))

    def forward(self, example: Example) -> Tensor:
        """Logits of the 20 residues, [S, L, 20]."""
        target, position = example.tokens[0], torch.arange(example.tokens.size(1))
        offset = (position[:, None] - position[None, :]).clamp(-MAX_OFFSET, MAX_OFFSET) + MAX_OFFSET
        msa = self.embed_msa(example.tokens)
        pair = self.embed_pair(NUM_TOKENS * target[:, None] + target[None, :]) + self.embed_offset(offset)
        for block in self.blocks:
            msa, pair = block(msa, pair, example.live)
        return self.head(msa)

    def loss(self, example: Example) -> Tensor:
        return nn.functional.cross_entropy(self(example).flatten(0, 1), example.labels.flatten())
