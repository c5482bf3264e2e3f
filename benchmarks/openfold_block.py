# SPDX-License-Identifier: BSD-3-Clause
"""An Evoformer block as OpenFold builds it (supplementary algorithm 6 of AlphaFold 2), in plain PyTorch.

Its `Attention` has OpenFold's interface, forward(q_x, kv_x, biases), so that `integrations.patch` finds it.
The triangle multiplications and the outer product, which `patch` does not touch, are part of the step that is timed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MSA_DIM, MSA_HEADS, PAIR_DIM, PAIR_HEADS, HIDDEN = 64, 8, 64, 4, 32
INF = 1e9


class Attention(nn.Module):
    def __init__(self, dim: int, no_heads: int) -> None:
        super().__init__()
        self.no_heads, self.c_hidden = no_heads, dim // no_heads
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.linear_g, self.linear_o = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, q_x: Tensor, kv_x: Tensor, biases: list[Tensor] | None = None) -> Tensor:
        q, k, v, g = (
            layer(x).unflatten(-1, (self.no_heads, -1)).transpose(-2, -3)
            for layer, x in ((self.linear_q, q_x), (self.linear_k, kv_x), (self.linear_v, kv_x), (self.linear_g, q_x))
        )
        logits = q * self.c_hidden**-0.5 @ k.transpose(-1, -2)
        for bias in biases or []:
            logits += bias
        out = (logits.softmax(-1) @ v) * g.sigmoid()
        return self.linear_o(out.transpose(-2, -3).flatten(-2))


class AxialAttention(nn.Module):
    """Along rows, or along columns; biased by a pair representation if `bias_dim` is given."""

    def __init__(self, dim: int, heads: int, by_columns: bool, bias_dim: int | None = None) -> None:
        super().__init__()
        self.by_columns = by_columns
        self.norm, self.mha = nn.LayerNorm(dim), Attention(dim, heads)
        self.bias = (
            None if bias_dim is None else nn.Sequential(nn.LayerNorm(bias_dim), nn.Linear(bias_dim, heads, bias=False))
        )

    def forward(self, x: Tensor, mask: Tensor, pair: Tensor | None = None) -> Tensor:
        if self.by_columns:
            x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
            pair = None if pair is None else pair.transpose(-2, -3)
        x = self.norm(x)
        biases = [(INF * (mask - 1))[..., None, None, :]]
        if self.bias is not None:
            biases.append(self.bias(pair).movedim(-1, -3).unsqueeze(-4))
        out = self.mha(x, x, biases)
        return out.transpose(-2, -3) if self.by_columns else out


class TriangleMultiplication(nn.Module):
    def __init__(self, outgoing: bool) -> None:
        super().__init__()
        self.equation = "ikc,jkc->ijc" if outgoing else "kic,kjc->ijc"
        self.norm, self.norm_out = nn.LayerNorm(PAIR_DIM), nn.LayerNorm(HIDDEN)
        self.left, self.right, self.left_gate, self.right_gate = (nn.Linear(PAIR_DIM, HIDDEN) for _ in range(4))
        self.gate, self.out = nn.Linear(PAIR_DIM, PAIR_DIM), nn.Linear(HIDDEN, PAIR_DIM)

    def forward(self, pair: Tensor, mask: Tensor) -> Tensor:
        x, m = self.norm(pair), mask[..., None]
        left, right = self.left(x) * self.left_gate(x).sigmoid() * m, self.right(x) * self.right_gate(x).sigmoid() * m
        return self.out(self.norm_out(torch.einsum(self.equation, left, right))) * self.gate(x).sigmoid()


class OuterProductMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(MSA_DIM), nn.Linear(MSA_DIM, 8), nn.Linear(MSA_DIM, 8)
        self.out = nn.Linear(64, PAIR_DIM)

    def forward(self, msa: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(msa)
        left, right = self.left(x) * mask[..., None], self.right(x) * mask[..., None]
        count = torch.einsum("si,sj->ij", mask, mask)[..., None]
        return self.out(torch.einsum("sic,sjd->ijcd", left, right).flatten(-2) / (count + 1e-3))


def transition(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))


class EvoformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = AxialAttention(MSA_DIM, MSA_HEADS, by_columns=False, bias_dim=PAIR_DIM)
        self.column = AxialAttention(MSA_DIM, MSA_HEADS, by_columns=True)
        self.msa_transition, self.outer = transition(MSA_DIM), OuterProductMean()
        self.outgoing, self.incoming = TriangleMultiplication(True), TriangleMultiplication(False)
        self.starting, self.ending = (AxialAttention(PAIR_DIM, PAIR_HEADS, c, bias_dim=PAIR_DIM) for c in (False, True))
        self.pair_transition = transition(PAIR_DIM)

    def forward(self, msa: Tensor, pair: Tensor, msa_mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        msa = msa + self.row(msa, msa_mask, pair)
        msa = msa + self.column(msa, msa_mask)
        msa = msa + self.msa_transition(msa)
        pair = pair + self.outer(msa, msa_mask)
        pair = pair + self.outgoing(pair, pair_mask)
        pair = pair + self.incoming(pair, pair_mask)
        pair = pair + self.starting(pair, pair_mask, pair)
        pair = pair + self.ending(pair, pair_mask, pair)
        return msa, pair + self.pair_transition(pair)
