# SPDX-License-Identifier: BSD-3-Clause
"""Attention modules with the interfaces that `integrations.patch` knows, written for the tests from their formulas, and the
packages' own modules where they are installed.

A case makes a module and a call of it: `make()` and `arguments()`, in float64 and at random. Every row attends to a key.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


def checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As Foundry's decorator: the parameters' names are those of `function` alone."""

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else function(*args)

    return wrapper


class Heads(nn.Linear):
    """[*, DIM] -> [*, HEADS, HEAD_DIM]"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (HEADS, HEAD_DIM))


class Tokens(nn.Module):
    """Foundry's attention of tokens; Z [L, L, DIM] counts for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.force_bfloat16 = self.use_deepspeed_evo = False
        self.to_q, self.to_k, self.to_v = (Heads(DIM, HIDDEN, bias=False) for _ in range(3))
        self.to_g = nn.Sequential(Heads(DIM, HIDDEN, bias=False), nn.Sigmoid())
        self.to_b, self.to_a = nn.Linear(DIM, HEADS, bias=False), nn.Linear(HIDDEN, DIM, bias=False)
        self.ln_0, self.ln_1 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def attend(self, a: Tensor, bias: Tensor, norms: Any = None) -> Tensor:
        q, k, v, g = (project(a) for project in (self.to_q, self.to_k, self.to_v, self.to_g))
        if norms is not None:
            q, k = (norm(x.flatten(-2)).unflatten(-1, x.shape[-2:]) for norm, x in zip(norms, (q, k), strict=True))
        logits = torch.einsum("...ihd,...jhd->...ijh", q * HEAD_DIM**-0.5, k) + bias
        return self.to_a((torch.einsum("...ijh,...jhd->...ihd", logits.softmax(-2), v) * g).flatten(-2))


class Foundry:
    class TriangleAttention(nn.Module):
        def __init__(self, start_node: bool = True) -> None:
            super().__init__()
            self.start_node, self.h, self.scaling = start_node, HEADS, HEAD_DIM**-0.5
            self.norm, self.to_b = nn.LayerNorm(DIM), nn.Linear(DIM, HEADS, bias=False)
            self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(3))
            self.to_g, self.to_out = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

        @checkpointed
        def forward(self, pair):
            pair = self.norm(pair)
            bias = self.to_b(pair).movedim(-1, 1).unsqueeze(1)
            pair = pair if self.start_node else pair.transpose(1, 2)
            q, k, v = (heads_first(project(pair)) for project in (self.to_q, self.to_k, self.to_v))
            out = self.to_g(pair).sigmoid() * heads_last(softmax_attention(q, k, v, [bias]))
            return self.to_out(out if self.start_node else out.transpose(1, 2))

    class AttentionPairBiasPairformerDeepspeed(Tokens):
        def forward(self, A_I, S_I, Z_II, Beta_II=None):
            return self.attend(self.ln_1(A_I), self.to_b(self.ln_0(Z_II)) + Beta_II[..., None])

    class AttentionPairBiasDiffusion(Tokens):
        def __init__(self, kq_norm: bool = True) -> None:
            super().__init__()
            self.kq_norm = kq_norm
            self.query_layer_norm, self.key_layer_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
            self.ada_ln_1 = nn.Bilinear(DIM, DIM, DIM)
            self.linear_output_project = nn.Sequential(nn.Linear(DIM, DIM), nn.Sigmoid())

        @checkpointed
        def forward(self, A_I, S_I, Z_II, Beta_II):
            if Beta_II is not None:
                return A_I * 0
            norms = (self.query_layer_norm, self.key_layer_norm) if self.kq_norm else None
            a = self.attend(self.ada_ln_1(A_I, S_I), self.to_b(self.ln_0(Z_II)), norms)
            return self.linear_output_project(S_I) * a


class HeadsOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return heads_first(x)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.is_local_attn, self.enable_attn_softclamp = None, False, False
        self.attn_dropout = nn.Dropout(0.0)


class AlphaFold3Pytorch:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.split_heads = Attend(), HeadsOut()
            self.to_q, self.to_kv = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, 2 * HIDDEN, bias=False)
            self.to_gates = nn.Sequential(nn.Linear(DIM, HIDDEN, bias=False), nn.Sigmoid())
            self.to_out = nn.Linear(HIDDEN, DIM, bias=False)
            self.memory_kv, self.accept_value_residual = None, False

        def forward(
            self,
            seq,
            mask=None,
            context=None,
            windowed_mask=None,
            attn_bias=None,
            return_values=False,
            value_residual=None,
        ):
            k, v = self.to_kv(seq if context is None else context).chunk(2, -1)
            q, k, v = (self.split_heads(x) for x in (self.to_q(seq), k, v))
            terms = [] if attn_bias is None else [attn_bias]
            if mask is not None:
                terms.append(torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -1e30)[:, None, None])
            out = self.to_out(heads_last(self.attend.attn_dropout(softmax_attention(q, k, v, terms))) * self.to_gates(seq))
            return (out, v) if return_values else out

    class TriangleAttention(nn.Module):
        def __init__(self, need_transpose: bool = False) -> None:
            super().__init__()
            self.need_transpose, self.attn, self.dropout = need_transpose, AlphaFold3Pytorch.Attention(), nn.Dropout(0.0)
            self.to_attn_bias = nn.Sequential(nn.Linear(DIM, HEADS, bias=False), HeadsToFront())

        def forward(self, pairwise_repr, mask=None, return_values=False, **kwargs):
            x = pairwise_repr.transpose(1, 2) if self.need_transpose else pairwise_repr
            bias = self.to_attn_bias(x).repeat_interleave(x.size(1), 0)
            mask = None if mask is None else mask.repeat_interleave(x.size(1), 0)
            out, values = self.attn(x.flatten(0, 1), mask=mask, attn_bias=bias, return_values=True, **kwargs)
            out = out.unflatten(0, x.shape[:2])
            out = self.dropout(out.transpose(1, 2) if self.need_transpose else out)
            return (out, values) if return_values else out


@dataclass
class Case:
    make: Callable[[], nn.Module]
    arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


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


def square(mask: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (normal(2, LENGTH, LENGTH, DIM),), {} if mask is None else {"mask": mask}


def tokens(conditioned: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    a, z = normal(2, LENGTH, DIM), normal(LENGTH, LENGTH, DIM)
    return ((a, normal(2, LENGTH, DIM), z, None) if conditioned else (a, None, z, normal(LENGTH, LENGTH))), {}


def alphafold3() -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = {"mask": padding(2, LENGTH).bool(), "attn_bias": normal(2, HEADS, LENGTH, LENGTH)}
    return (normal(2, LENGTH, DIM),), given


def installed(module: str, name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """Makes an instance of a package's own class; the test is skipped where the package is missing."""

    def make() -> nn.Module:
        os.environ.setdefault("LAYERNORM_TYPE", "torch")  # Protenix compiles a CUDA extension otherwise
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module}: {error}")
        return getattr(found, name)(*args, **kwargs).double()

    return make


def qwen(package: str, name: str, config_name: str, implementation: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("transformers.models")
        model = importlib.import_module(f"{models.__name__}.{package}.modeling_{package}")
        config = getattr(importlib.import_module(f"{models.__name__}.{package}.configuration_{package}"), config_name)(
            hidden_size=DIM, num_attention_heads=4, num_key_value_heads=2, head_dim=16
        )
        config._attn_implementation = implementation
        return getattr(model, name)(config, layer_idx=0).double()

    return make


_SAME = (DIM, DIM, DIM, HEAD_DIM, HEADS)

WRITTEN = {
    "OpenFold": Case(OpenFold.Attention, lambda: folding("openfold")),
    "OpenFold without gate": Case(lambda: OpenFold.Attention(gating=False), lambda: folding("openfold")),
    "Boltz triangular": Case(lambda: Boltz.Attention(biases=False), lambda: folding("boltz")),
    "Boltz-1 pair bias": Case(Boltz1.AttentionPairBias, lambda: diffusion(1)),
    "Boltz-2 pair bias": Case(Boltz2.AttentionPairBias, lambda: diffusion(2)),
    "Protenix": Case(lambda: Protenix.Attention(biases=False), protenix_call),
    "EsmFoldAttention": Case(EsmFoldAttention, lambda: folding("esmfold")),
    "EsmFoldSelfAttention": Case(EsmFoldSelfAttention, esm_self),
    "Foundry triangle, starting": Case(Foundry.TriangleAttention, square),
    "Foundry triangle, ending": Case(lambda: Foundry.TriangleAttention(start_node=False), square),
    "Foundry pairformer": Case(Foundry.AttentionPairBiasPairformerDeepspeed, lambda: tokens(False)),
    "Foundry diffusion": Case(Foundry.AttentionPairBiasDiffusion, lambda: tokens(True)),
    "Foundry diffusion without norms": Case(lambda: Foundry.AttentionPairBiasDiffusion(False), lambda: tokens(True)),
    "alphafold3-pytorch Attention": Case(AlphaFold3Pytorch.Attention, alphafold3),
    "alphafold3-pytorch triangle": Case(AlphaFold3Pytorch.TriangleAttention, lambda: square(padding(2, LENGTH).bool())),
    "alphafold3-pytorch triangle, ending": Case(lambda: AlphaFold3Pytorch.TriangleAttention(True), square),
    "Qwen3NextAttention": Case(Qwen3NextAttention, lambda: decoder(None)),
    "Qwen3NextAttention, mask": Case(Qwen3NextAttention, lambda: decoder("boolean")),
    "Qwen3NextAttention, eager": Case(lambda: Qwen3NextAttention("eager"), lambda: decoder("additive")),
}

_ESM = "transformers.models.esm.modeling_esmfold"
_QWEN3_NEXT = ("qwen3_next", "Qwen3NextAttention", "Qwen3NextConfig")

INSTALLED = {
    "openfold3 Attention": Case(
        installed("openfold3.core.model.primitives.attention", "Attention", *_SAME), lambda: folding("openfold")
    ),
    "boltz Attention": Case(
        installed("boltz.model.layers.triangular_attention.primitives", "Attention", *_SAME), lambda: folding("boltz")
    ),
    "boltz AttentionPairBias (1)": Case(
        installed("boltz.model.layers.attention", "AttentionPairBias", HIDDEN, DIM, HEADS), lambda: diffusion(1)
    ),
    "boltz AttentionPairBias (2)": Case(
        installed("boltz.model.layers.attentionv2", "AttentionPairBias", HIDDEN, DIM, HEADS), lambda: diffusion(2)
    ),
    "protenix Attention": Case(
        installed("protenix.model.modules.primitives", "Attention", *_SAME, use_efficient_implementation=False),
        protenix_call,
    ),
    "protenix triangular Attention": Case(
        installed("protenix.model.triangular.layers", "Attention", *_SAME), lambda: folding("openfold")
    ),
    "transformers EsmFoldAttention": Case(installed(_ESM, "EsmFoldAttention", *_SAME), lambda: folding("esmfold")),
    "transformers EsmFoldSelfAttention": Case(
        installed(_ESM, "EsmFoldSelfAttention", HIDDEN, HEADS, HEAD_DIM, gated=True), esm_self
    ),
    "transformers Qwen3NextAttention": Case(qwen(*_QWEN3_NEXT, "sdpa"), lambda: decoder(None)),
    "transformers Qwen3NextAttention, mask": Case(qwen(*_QWEN3_NEXT, "sdpa"), lambda: decoder("boolean")),
    "transformers Qwen3NextAttention, eager": Case(qwen(*_QWEN3_NEXT, "eager"), lambda: decoder("additive")),
    "transformers Qwen3_5Attention": Case(
        qwen("qwen3_5", "Qwen3_5Attention", "Qwen3_5TextConfig", "sdpa"), lambda: decoder("boolean")
    ),
}
