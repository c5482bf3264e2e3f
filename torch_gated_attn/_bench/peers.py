# SPDX-License-Identifier: BSD-3-Clause
"""The paths that are compared: the operator, and what a PyTorch user would write without it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import peers_cuda

Path = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"], Tensor]

COMPILED = ("compile", "flex")  # only with a compiler

MASKED_LOGIT = -1e9  # AlphaFold's; unlike -inf it needs no care for rows without a key


def operator(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    out: Tensor = torch.ops.torch_gated_attn.gated_attention(query, key, value, gate, bias, mask)
    return out


def eager(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    heads, kv_heads = query.size(-3), key.size(-3)
    query = query * query.size(-1) ** -0.5
    # Grouped heads become further queries of their key: no copy of key and value, the fastest plain form.
    grouped = torch.unflatten(query, -3, (kv_heads, heads // kv_heads)).flatten(-3, -2) if kv_heads != heads else query
    scores = torch.matmul(grouped, key.transpose(-1, -2))
    if kv_heads != heads:
        scores = torch.unflatten(scores, -2, (heads // kv_heads, -1)).flatten(-4, -3)  # [*, H, Q, K]
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = torch.where(mask, scores, MASKED_LOGIT)
    weights = torch.softmax(scores, -1)
    if kv_heads != heads:
        weights = torch.unflatten(weights, -3, (kv_heads, heads // kv_heads)).flatten(-3, -2)
    out = torch.matmul(weights, value)
    if kv_heads != heads:
        out = torch.unflatten(out, -2, (heads // kv_heads, -1)).flatten(-4, -3)
    return out if gate is None else out * torch.sigmoid(gate)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    # SDPA takes one mask argument, so bias and mask must be merged into a tensor; a lone bool mask is passed as it is.
    merged = mask if bias is None else bias
    if bias is not None and mask is not None:
        merged = torch.where(mask, bias, MASKED_LOGIT)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=merged, enable_gqa=query.size(-3) != key.size(-3)
    )
    return out if gate is None else out * torch.sigmoid(gate)


def compiled_eager() -> Path:
    """A fresh torch.compile of `eager`: specialised to one workload, so no recompilation limit is met."""
    torch.compiler.reset()
    compiled: Path = torch.compile(eager, dynamic=False)
    return compiled


def paths(with_compile: bool = True, device: str = "cpu") -> dict[str, Path]:
    found: dict[str, Path] = {"operator": operator, "eager": eager}
    found |= peers_cuda.paths(sdpa, MASKED_LOGIT, with_compile) if device == "cuda" else {"sdpa": sdpa}
    if with_compile:
        found["compile"] = compiled_eager()
    return found
