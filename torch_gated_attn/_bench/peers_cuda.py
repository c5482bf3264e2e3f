# SPDX-License-Identifier: BSD-3-Clause
"""What competes on a GPU: SDPA's efficient and cuDNN kernels, FlexAttention, and trifast where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

Path = Callable[..., Tensor]
BACKENDS = {"sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}


def with_one_batch_dimension(path: Path) -> Path:
    """The fused kernels of SDPA take four dimensions; what is broadcast along one of several batch dimensions is copied."""

    def flattened(query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> Tensor:
        batch = query.shape[:-3]
        if len(batch) == 1:
            return path(query, key, value, *others)

        def flat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.expand(*batch, *tensor.shape[-3:]).flatten(0, -4)

        out = path(*map(flat, (query, key, value, *others)))
        return torch.unflatten(out, 0, batch)

    return flattened


def sdpa_of(sdpa: Path, backend: SDPBackend) -> Path:
    def path(*tensors: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(*tensors)

    return with_one_batch_dimension(path)


def flex(masked_logit: float, compiled: bool = True) -> Path:
    run: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def path(
        query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        batch = query.shape[:-3]

        def at(tensor: Tensor, entry: Tensor, *place: Tensor) -> Tensor:
            """An element of a broadcast tensor: nothing is expanded in memory."""
            index: list[Tensor] = list(place)
            for size in reversed(batch):
                index.insert(0, entry % size)
                entry = entry // size
            return tensor.squeeze()[tuple(i for i, n in zip(index, tensor.shape, strict=True) if n != 1)]

        def score_mod(score: Tensor, *place: Tensor) -> Tensor:
            if bias is not None:
                score = score + at(bias, *place)
            return score if mask is None else torch.where(at(mask, *place), score, masked_logit)

        tensors = (tensor.flatten(0, -4) for tensor in (query, key, value))
        out: Tensor = run(*tensors, score_mod=score_mod, enable_gqa=query.size(-3) != key.size(-3)).unflatten(0, batch)
        return out if gate is None else out * torch.sigmoid(gate)

    return path


def trifast(triangle_attention: Path) -> Path:
    """trifast takes [H, rows, N, D], one bias for all rows, and a mask that is true where a key is left out."""

    def path(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, bias: Tensor | None, mask: Tensor) -> Tensor:
        if query.dim() != 4 or bias is None or bias.size(0) != 1 or query.size(-3) != key.size(-3):
            raise ValueError("trifast computes one bias for all batch rows, and as many key heads as query heads")
        heads_first = (tensor.transpose(0, 1) for tensor in (query, key, value))
        left_out = ~mask[:, 0, 0].expand(query.size(0), -1)
        out = triangle_attention(*heads_first, bias[0], left_out).transpose(0, 1)
        return out if gate is None else out * torch.sigmoid(gate)

    return path


def paths(sdpa: Path, masked_logit: float, with_compile: bool) -> dict[str, Path]:
    found = {name: sdpa_of(sdpa, backend) for name, backend in BACKENDS.items()}
    if with_compile:  # without a compiler FlexAttention computes all scores
        torch.compiler.reset()
        found["flex"] = flex(masked_logit)
    if importlib.util.find_spec("trifast"):
        from trifast import triangle_attention

        found["trifast"] = trifast(triangle_attention)
    return found
