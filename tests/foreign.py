# SPDX-License-Identifier: BSD-3-Clause
"""Attention modules with the interfaces that `integrations.patch` knows, written for the tests from their formulas, and
calls of them, in float64 and at random. Every row attends to a key; cases.py lists them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from torch_gated_attn import reference

DIM, HEADS, HEAD_DIM, LENGTH, ROWS = 20, 3, 8, 13, 5
HIDDEN = HEADS * HEAD_DIM


def heads_first(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def heads_last(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, terms: list[Tensor]) -> Tensor:
    """Plain attention with additive terms, in the inputs' dtype."""
    logits = q * q.size(-1) ** -0.5 @ k.transpose(-1, -2)
    for term in terms:
        logits = logits + term
    return logits.softmax(-1).to(v.dtype) @ v


class Projections(nn.Module):
    def __init__(self, biases: bool = True, gating: bool = True) -> None:
        super().__init__()
        self.no_heads = self.num_heads = HEADS
        self.c_hidden = HEAD_DIM
        self.linear_q = nn.Linear(DIM, HIDDEN, bias=False)
        self.linear_k = nn.Linear(DIM, HIDDEN, bias=False)
        self.linear_v = nn.Linear(DIM, HIDDEN, bias=False)
        self.linear_o = nn.Linear(HIDDEN, DIM, bias=biases)
        self.linear_g = nn.Linear(DIM, HIDDEN, bias=biases) if gating else None
        self.sigmoid = nn.Sigmoid()

    def attend(self, q_x: Tensor, kv_x: Tensor, terms: list[Tensor]) -> Tensor:
        q, k, v = heads_first(self.linear_q(q_x)), heads_first(self.linear_k(kv_x)), heads_first(self.linear_v(kv_x))
        out = softmax_attention(q, k, v, terms)
        if self.linear_g is not None:
            out = out * self.sigmoid(heads_first(self.linear_g(q_x)))
        return self.linear_o(heads_last(out))


class OpenFold:
    class Attention(Projections):
        def forward(self, q_x, kv_x, biases=None, use_memory_efficient_kernel=False, use_lma=False, use_flash=False):
            return self.attend(q_x, kv_x, biases or [])


class Boltz:
    class Attention(Projections):
        def forward(self, q_x, kv_x, tri_bias, mask_bias, mask, use_kernels=False):
            return self.attend(q_x, kv_x, [mask_bias, tri_bias])


class Protenix:
    class Attention(Projections):
        def forward(self, q_x, kv_x, attn_bias=None, trunked_attn_bias=None, n_queries=None, n_keys=None, chunk_size=None):
            if n_queries:
                return q_x * 0
            return self.attend(q_x, kv_x, [attn_bias] if attn_bias.dim() == q_x.dim() + 1 else [attn_bias.unsqueeze(-3)])


class PairBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.initial_norm, self.inf = HEADS, HEAD_DIM, True, 1e6
        self.norm_s = nn.LayerNorm(HIDDEN)
        self.proj_q = nn.Linear(HIDDEN, HIDDEN)
        self.proj_k, self.proj_v, self.proj_g, self.proj_o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.proj_z = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, HEADS, bias=False), HeadsToFront())

    def attend(self, s, k_in, bias, mask, multiplicity):
        q, k, v = (heads_first(x) for x in (self.proj_q(s), self.proj_k(k_in), self.proj_v(k_in)))
        hidden = (1 - mask[:, None, None].float()) * -self.inf
        out = softmax_attention(q.to(bias.dtype), k.to(bias.dtype), v, [bias.repeat_interleave(multiplicity, 0), hidden])
        return self.proj_o(heads_last(out) * self.proj_g(s).sigmoid())


class HeadsToFront(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class Boltz1:
    class AttentionPairBias(PairBias):
        def forward(self, s, z, mask, multiplicity=1, to_keys=None, model_cache=None):
            s = k_in = self.norm_s(s)
            if to_keys is not None:
                k_in, mask = to_keys(s), to_keys(mask.unsqueeze(-1)).squeeze(-1)
            cache = {} if model_cache is None else model_cache
            if "z" not in cache:
                cache["z"] = self.proj_z(z)
            return self.attend(s, k_in, cache["z"], mask, multiplicity)


class Boltz2:
    class AttentionPairBias(PairBias):
        def forward(self, s, z, mask, k_in, multiplicity=1):
            return self.attend(s, k_in, self.proj_z(z), mask, multiplicity)


class EsmFoldAttention(Projections):
    def forward(self, q_x, kv_x, biases=None, use_memory_efficient_kernel=False, use_lma=False, use_flash=False):
        return self.attend(q_x, kv_x, biases or [])


class EsmFoldSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.gated, self.rescale_factor = HEADS, True, HEAD_DIM**-0.5
        self.proj = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.o_proj, self.g_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, mask=None, bias=None, indices=None):
        q, k, v = heads_first(self.proj(x)).chunk(3, -1)
        hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)[:, None, None]
        out = heads_last(softmax_attention(q, k, v, [bias.permute(0, 3, 1, 2), hidden]))
        return self.o_proj(self.g_proj(x).sigmoid() * out), "maps"


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return rotate(q), rotate(k)


class Qwen3NextAttention(nn.Module):
    def __init__(self, implementation: str = "sdpa") -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=implementation)
        self.head_dim, self.scaling, self.layer_idx, self.attention_dropout = 16, 16**-0.5, 0, 0.0
        self.q_proj = nn.Linear(DIM, 4 * 2 * 16, bias=False)
        self.k_proj, self.v_proj = nn.Linear(DIM, 2 * 16, bias=False), nn.Linear(DIM, 2 * 16, bias=False)
        self.o_proj = nn.Linear(4 * 16, DIM, bias=False)
        self.q_norm, self.k_norm = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        q, gate = heads_first(self.q_proj(hidden_states), 4).chunk(2, -1)
        k, v = heads_first(self.k_proj(hidden_states), 2), heads_first(self.v_proj(hidden_states), 2)
        q, k = apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), *position_embeddings)
        if attention_mask is None:
            attention_mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
        additive = attention_mask.dtype != torch.bool
        terms = {"bias": attention_mask} if additive else {"mask": attention_mask}
        out = reference.gated_attention(q, k, v, gate, scale=self.scaling, **terms)
        return self.o_proj(heads_last(out)), "maps"


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def padding(*shape: int) -> Tensor:
    """0 and 1: from the first key up to a random one, as padding is, so every row attends to a key."""
    length = torch.randint(1, shape[-1] + 1, shape[:-1])
    return (torch.arange(shape[-1]) < length[..., None]).double()


def folding(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A triangle attention's call: rows of a pair representation, a mask per row, a bias shared by all rows."""
    x, mask, pair = normal(2, ROWS, LENGTH, DIM), padding(2, ROWS, LENGTH), normal(2, 1, HEADS, LENGTH, LENGTH)
    mask_bias = (1e9 * (mask - 1))[..., None, None, :]
    if name == "boltz":
        return (x, x, pair, mask_bias, mask[..., None, None, :]), {}
    return (x, x, [mask_bias, pair]), {}


def diffusion(version: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    s, z, mask = normal(2 * 3, LENGTH, HIDDEN), normal(2, LENGTH, LENGTH, DIM), padding(6, LENGTH)
    return ((s, z, mask) if version == 1 else (s, z, mask, s)), {"multiplicity": 3}


def protenix_call() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (normal(2, LENGTH, DIM), normal(2, LENGTH, DIM)), {"attn_bias": normal(2, HEADS, LENGTH, LENGTH)}


def esm_self() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (normal(2, LENGTH, HIDDEN),), {"mask": padding(2, LENGTH).bool(), "bias": normal(2, LENGTH, LENGTH, HEADS)}


def rotation(length: int, size: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.cat((angle, angle), -1)[None].double()
    return angle.cos(), angle.sin()


def decoder(mask: str | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    visible = padding(2, LENGTH).bool()[:, None, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    given = None if mask is None else visible
    if mask == "additive":
        given = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min).double()
    return (normal(2, LENGTH, DIM), rotation(LENGTH, 16)), {"attention_mask": given}
