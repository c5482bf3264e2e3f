# SPDX-License-Identifier: BSD-3-Clause
"""Every shim and every adapter of `integrations` beside its original, as modules of a few tensors: `test_everywhere` calls
them in every way that PyTorch can call a function.

The last tensor of a subject is what may be a mask: "mask" hides keys with it, "constant" and "differentiable" put small
numbers there, which no mask may stand for. An interface whose mask is boolean has its bias there in those two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import foreign
import foreign_alphafold3
import torch
from foreign import HEADS, LENGTH, ROWS, normal, padding, softmax_attention
from torch import Tensor, nn

from torch_gated_attn.integrations import functions, patch

KINDS = ("mask", "constant", "differentiable")


class Called(nn.Module):
    """`function(module, *tensors)`, the first tensor times a parameter, so that a function too has gradients to compare."""

    def __init__(self, function: Callable[..., Tensor], module: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.module = function, module
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        args = (first * self.factor, *others)
        out = self.function(*args) if self.module is None else self.function(self.module, *args)
        return out[0] if isinstance(out, tuple) else out


@dataclass
class Subject:
    """make() gives original and replaced, tensors(kind) their arguments; the last is the mask or bias in question."""

    make: Callable[[], tuple[nn.Module, nn.Module]]
    tensors: Callable[[str], Sequence[Tensor]]
    adapter: str | None = None  # its name, or
    shim: str | None = None  # the function's


def soft(*shape: int) -> Tensor:
    return -2 * torch.rand(shape, dtype=torch.float64)


def additive(kind: str, *shape: int) -> Tensor:
    return 1e9 * (padding(*shape) - 1) if kind == "mask" else soft(*shape)


def nearly_one(kind: str, *shape: int) -> Tensor:
    """As a mask of 0 and 1 that hides by (1 - mask) * -1e6, or one that means small numbers."""
    return padding(*shape) if kind == "mask" else 1 + soft(*shape) * 1e-6


def of_module(adapter: str, make: Callable[[], nn.Module], call: Callable[..., Any], tensors: Any) -> Subject:
    def pair() -> tuple[nn.Module, nn.Module]:
        original = make().double()
        replaced = copy.deepcopy(original)
        assert patch(replaced).replaced[0].note == adapter
        return Called(call, original), Called(call, replaced)

    return Subject(pair, tensors, adapter=adapter)


def of_function(shim: str, original: Callable[..., Any], call: Callable[..., Any], tensors: Any) -> Subject:
    return Subject(lambda: (Called(original), Called(call)), tensors, shim=shim)


def folding_tensors(kind: str) -> tuple[Tensor, ...]:
    pair = normal(2, 1, HEADS, LENGTH, LENGTH)
    return normal(2, ROWS, LENGTH, foreign.DIM), pair, additive(kind, 2, ROWS, 1, 1, LENGTH)


def diffusion_tensors(kind: str) -> tuple[Tensor, ...]:
    return normal(4, LENGTH, foreign.HIDDEN), normal(2, LENGTH, LENGTH, foreign.DIM), nearly_one(kind, 4, LENGTH)


def esm_tensors(kind: str) -> tuple[Tensor, ...]:
    x, mask, bias = normal(2, LENGTH, foreign.HIDDEN), padding(2, LENGTH).bool(), normal(2, LENGTH, LENGTH, HEADS)
    return (x, bias, mask) if kind == "mask" else (x, mask, bias)


def esm(module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Any:
    mask, bias = (a, b) if a.dtype == torch.bool else (b, a)
    return module(x, mask=mask, bias=bias)


def decoder_tensors(kind: str) -> tuple[Tensor, ...]:
    return normal(2, LENGTH, foreign.DIM), *foreign.rotation(LENGTH, 16), additive(kind, 2, 1, 1, LENGTH)


def alphafold3_tensors(kind: str) -> tuple[Tensor, ...]:
    x, mask, bias = normal(2, LENGTH, foreign.DIM), padding(2, LENGTH).bool(), normal(2, HEADS, LENGTH, LENGTH)
    return (x, bias, mask) if kind == "mask" else (x, mask, bias)


def alphafold3(module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Any:
    mask, bias = (a, b) if a.dtype == torch.bool else (b, a)
    return module(x, mask, attn_bias=bias)


def square_tensors(kind: str) -> tuple[Tensor, ...]:
    """A pair representation, whose bias is made inside, and a mask where there is one."""
    pair = normal(2, LENGTH, LENGTH, foreign.DIM)
    return (pair, padding(2, LENGTH).bool()) if kind == "mask" else (pair,)


def rows(kind: str, *shape: int) -> tuple[Tensor, ...]:
    """query, key, value; pair bias; mask or bias of the keys of every row."""
    return *(normal(*shape) for _ in range(3)), normal(2, 1, HEADS, LENGTH, LENGTH), additive(kind, 2, ROWS, 1, 1, LENGTH)


def evoformer(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, bias: Tensor) -> Tensor:
    return softmax_attention(*(x.transpose(-2, -3) for x in (q, k, v)), [bias, pair]).transpose(-2, -3)


def boolean_or_bias(kind: str, shape: Sequence[int], mask: Sequence[int], bias: Sequence[int]) -> tuple[Tensor, ...]:
    """query, key, value, then bias and mask, the one in question last."""
    terms = normal(*bias), padding(*mask).bool()
    return *(normal(*shape) for _ in range(3)), *(terms if kind == "mask" else terms[::-1])


def triangle(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    mask, bias = (a, b) if a.dtype == torch.bool else (b, a)
    return softmax_attention(q, k, v, [bias, torch.where(mask, 0.0, -1e9)])


def our_triangle(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Any:
    mask, bias = (a, b) if a.dtype == torch.bool else (b, a)
    return functions.triangle_attention(q, k, v, bias, mask)


def trifast(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    mask, bias = (a, b) if a.dtype == torch.bool else (b, a)
    query, key, value = (x.transpose(-3, -4) for x in (q, k, v))
    hidden = torch.where(mask[..., None, None, :], 0.0, -1e9)
    return softmax_attention(query, key, value, [bias[..., None, :, :, :], hidden]).transpose(-3, -4)


def our_trifast(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    mask, bias = (a, b) if a.dtype == torch.bool else (b, a)
    return functions.trifast_triangle_attention(q, k, v, bias, ~mask)


def pair_biased(single: Tensor, z: Tensor, weights: Tensor, w_z: Tensor, mask: Tensor) -> Tensor:
    """cuEquivariance's, from algorithm 24 of AlphaFold 3: two samples of each structure."""
    a = nn.functional.layer_norm(single, single.shape[-1:])
    q, k, v, g = (foreign.heads_first(a @ w.T) for w in weights[:4])
    bias = (nn.functional.layer_norm(z, z.shape[-1:]) @ w_z.T).movedim(-1, -3).repeat_interleave(2, -4)
    hidden = (1 - mask[..., None, None, :].float()) * -1e6
    return foreign.heads_last(softmax_attention(q, k, v, [bias, hidden]) * g.sigmoid()) @ weights[4].T


def our_pair_biased(single: Tensor, z: Tensor, weights: Tensor, w_z: Tensor, mask: Tensor) -> Any:
    q, k, v, g, o = weights.unbind(0)
    ones = torch.ones_like(single[0, 0])
    return functions.attention_pair_bias(single, z, mask, HEADS, ones, None, q, None, k, v, g, o, w_z)


def pair_biased_tensors(kind: str) -> tuple[Tensor, ...]:
    size = foreign.HIDDEN
    weights = normal(5, size, size) * size**-0.5, normal(HEADS, foreign.DIM)
    return normal(4, LENGTH, size), normal(2, LENGTH, LENGTH, foreign.DIM), *weights, nearly_one(kind, 4, LENGTH)


def transformers(q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor, mask: Tensor) -> Any:
    return softmax_attention(q, k, v, [position_bias, mask]).transpose(-2, -3)


ENCODER = SimpleNamespace(is_causal=False)


def our_transformers(q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor, mask: Tensor) -> Any:
    return functions._transformers_attention(ENCODER, q, k, v, mask, position_bias=position_bias)


def encoder_tensors(kind: str) -> tuple[Tensor, ...]:
    tensors = (normal(2, HEADS, LENGTH, 8) for _ in range(3))
    return *tensors, normal(1, HEADS, LENGTH, LENGTH), additive(kind, 2, 1, 1, LENGTH)


_ROWS, _FIRST = (2, ROWS, HEADS, LENGTH, 8), (2, ROWS, LENGTH, HEADS, 8)
_SQUARE = (2, HEADS, LENGTH, LENGTH, 8)

SUBJECTS = {
    "OpenFold": of_module(
        "OpenFold Attention",
        foreign.OpenFold.Attention,
        lambda m, x, pair, bias: m(x, x, [bias, pair]),
        folding_tensors,
    ),
    "EsmFoldAttention": of_module(
        "ESMFold EsmFoldAttention",
        foreign.EsmFoldAttention,
        lambda m, x, pair, bias: m(x, x, [bias, pair]),
        folding_tensors,
    ),
    "EsmFoldSelfAttention": of_module("ESMFold EsmFoldSelfAttention", foreign.EsmFoldSelfAttention, esm, esm_tensors),
    "Boltz triangular": of_module(
        "Boltz triangular Attention",
        lambda: foreign.Boltz.Attention(biases=False),
        lambda m, x, pair, bias: m(x, x, pair, bias, bias == 0),
        folding_tensors,
    ),
    "Boltz-1 pair bias": of_module(
        "Boltz-1 AttentionPairBias",
        foreign.Boltz1.AttentionPairBias,
        lambda m, s, z, mask: m(s, z, mask, multiplicity=2),
        diffusion_tensors,
    ),
    "Boltz-2 pair bias": of_module(
        "Boltz-2 AttentionPairBias",
        foreign.Boltz2.AttentionPairBias,
        lambda m, s, z, mask: m(s, z, mask, s, multiplicity=2),
        diffusion_tensors,
    ),
    "Protenix": of_module(
        "Protenix Attention",
        lambda: foreign.Protenix.Attention(biases=False),
        lambda m, x, bias: m(x, x, bias),
        lambda kind: (normal(2, LENGTH, foreign.DIM), additive(kind, 2, 1, 1, LENGTH)),
    ),
    "Foundry triangle": of_module(
        "Foundry TriangleAttention",
        lambda: foreign_alphafold3.Foundry.TriangleAttention(start_node=False),
        lambda m, pair: m(pair),
        lambda kind: square_tensors("bias"),
    ),
    "Foundry pairformer": of_module(
        "Foundry pairformer attention",
        foreign_alphafold3.Foundry.AttentionPairBiasPairformerDeepspeed,
        lambda m, a, z, beta: m(a, None, z, beta),
        lambda kind: (*(foreign_alphafold3.tokens(False)[0][i] for i in (0, 2)), additive(kind, LENGTH, LENGTH)),
    ),
    "Foundry diffusion": of_module(
        "Foundry diffusion attention",
        foreign_alphafold3.Foundry.AttentionPairBiasDiffusion,
        lambda m, a, s, z: m(a, s, z, None),
        lambda kind: foreign_alphafold3.tokens(True)[0][:3],
    ),
    "alphafold3-pytorch": of_module(
        "alphafold3-pytorch Attention", foreign_alphafold3.AlphaFold3Pytorch.Attention, alphafold3, alphafold3_tensors
    ),
    "alphafold3-pytorch triangle": of_module(
        "alphafold3-pytorch TriangleAttention",
        foreign_alphafold3.AlphaFold3Pytorch.TriangleAttention,
        lambda m, pair, mask=None: m(pair, mask),
        square_tensors,
    ),
    "Qwen3NextAttention": of_module(
        "Qwen gated attention",
        lambda: foreign.Qwen3NextAttention("eager"),
        lambda m, x, cos, sin, mask: m(x, (cos, sin), mask),
        decoder_tensors,
    ),
    "DS4Sci_EvoformerAttention": of_function(
        "DS4Sci_EvoformerAttention",
        evoformer,
        lambda q, k, v, pair, bias: functions.DS4Sci_EvoformerAttention(q, k, v, [bias, pair]),
        lambda kind: rows(kind, *_FIRST),
    ),
    "triangle_attention": of_function(
        "triangle_attention",
        triangle,
        our_triangle,
        lambda kind: boolean_or_bias(kind, _ROWS, (2, ROWS, 1, 1, LENGTH), (2, 1, HEADS, LENGTH, LENGTH)),
    ),
    "trifast_triangle_attention": of_function(
        "trifast_triangle_attention",
        trifast,
        our_trifast,
        lambda kind: boolean_or_bias(kind, _SQUARE, (2, LENGTH, LENGTH), (2, HEADS, LENGTH, LENGTH)),
    ),
    "attention_pair_bias": of_function("attention_pair_bias", pair_biased, our_pair_biased, pair_biased_tensors),
    "transformers": of_function("register_transformers", transformers, our_transformers, encoder_tensors),
}
