# SPDX-License-Identifier: BSD-3-Clause
"""AlphaFold's gated attention in plain PyTorch, as one writes it from the paper (supplementary algorithm 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Drop-in for torch_gated_attn.GatedAttention: same arguments, same parameters, same result."""

    def __init__(self, q_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_q = nn.Linear(q_dim, q_dim, bias=False)
        self.linear_k = nn.Linear(q_dim, q_dim, bias=False)
        self.linear_v = nn.Linear(q_dim, q_dim, bias=False)
        self.linear_g = nn.Linear(q_dim, q_dim)
        self.linear_o = nn.Linear(q_dim, q_dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)  # [*, L, H * D] -> [*, H, L, D]

    def forward(
        self, q_data: Tensor, m_data: Tensor | None = None, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        m_data = q_data if m_data is None else m_data
        q, k, v = self._heads(self.linear_q(q_data)), self._heads(self.linear_k(m_data)), self._heads(self.linear_v(m_data))
        scores = torch.matmul(q * q.size(-1) ** -0.5, k.transpose(-1, -2))  # [*, H, Q, K]
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = torch.where(mask, scores, -1e9)
        out = torch.matmul(torch.softmax(scores, -1), v)
        out = out * torch.sigmoid(self._heads(self.linear_g(q_data)))
        return self.linear_o(out.transpose(-2, -3).flatten(-2))
