# SPDX-License-Identifier: BSD-3-Clause
"""Every public module, small, with arguments for its forward: a promise that all of them make is tested on this list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_gated_attn import GatedAttention
from torch_gated_attn.alphafold import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    TriangleAttention,
)

HEADS, MSA_DIM, PAIR_DIM = 4, 16, 12

MODULES: dict[str, Callable[..., nn.Module]] = {
    "self-attention": lambda **options: GatedAttention(MSA_DIM, HEADS, **options),
    "cross-attention": lambda **options: GatedAttention(MSA_DIM, HEADS, kv_dim=PAIR_DIM, value_dim=20, **options),
    "without gating": lambda **options: GatedAttention(MSA_DIM, HEADS, gating=False, q_bias=True, **options),
    "row attention": lambda **options: MSARowAttentionWithPairBias(MSA_DIM, PAIR_DIM, HEADS, **options),
    "column attention": lambda **options: MSAColumnAttention(MSA_DIM, HEADS, **options),
    "column global attention": lambda **options: MSAColumnGlobalAttention(MSA_DIM, HEADS, **options),
    "triangle, starting": lambda **options: TriangleAttention(PAIR_DIM, HEADS, **options),
    "triangle, ending": lambda **options: TriangleAttention(PAIR_DIM, HEADS, starting=False, **options),
}


def make(name: str) -> nn.Module:
    """With every parameter random, also those that start at 0 or 1."""
    module = MODULES[name](dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def calls(name: str, sequences: int = 3, length: int = 5) -> list[tuple[Tensor | None, ...]]:
    """Arguments with a mask, and the same with every optional one left at None; floats require grad."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def mask(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.7

    if name.startswith("triangle"):
        pair = normal(length, length, PAIR_DIM)
        return [(pair, mask(length, length)), (pair, None)]
    msa = normal(sequences, length, MSA_DIM)
    if name == "row attention":
        pair = normal(length, length, PAIR_DIM)
        return [(msa, mask(sequences, length), pair), (msa, None, pair)]
    if name.startswith("column"):
        return [(msa, mask(sequences, length)), (msa, None)]
    other = normal(sequences, length + 1, PAIR_DIM if name == "cross-attention" else MSA_DIM)
    keys, queries = length + 1, length
    full = (msa, other, mask(sequences, queries, keys), normal(HEADS, queries, keys))
    return [full, (msa, other, None, None)] + ([] if name == "cross-attention" else [(msa, None, None, None)])


def results(module: Callable[..., Tensor], parameters: list[nn.Parameter], arguments: tuple[Tensor | None, ...]):
    """The result and the gradients of every parameter and argument, with a random cotangent."""
    out = module(*arguments)
    leaves = [*parameters, *(x for x in arguments if x is not None and x.requires_grad)]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    grads = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    return out, [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]
