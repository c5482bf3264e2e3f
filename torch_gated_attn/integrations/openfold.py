# SPDX-License-Identifier: BSD-3-Clause
"""OpenFold and OpenFold-3 `Attention`, and Protenix's triangular one: forward(q_x, kv_x, biases=None, ...flags).

The flags choose how the same formula is computed (low-memory, DeepSpeed, cuEquivariance, Triton, chunk sizes), so they are
ignored; `use_high_precision` runs the operator in float32. `use_flash` with its own mask keeps the original forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import gated_attention
from ._adapter import Adapter
from ._biases import heads_first, merge

__all__ = ["ADAPTERS", "ALGORITHMS", "attend", "forward"]

# Parameters that choose an algorithm, not a result.
ALGORITHMS = frozenset(
    {
        "use_memory_efficient_kernel",
        "use_deepspeed_evo_attention",
        "use_cuequivariance_attention",
        "use_cueq_triangle_kernels",
        "use_triton_triangle_kernels",
        "use_lma",
        "lma_q_chunk_size",
        "lma_kv_chunk_size",
        "q_chunk_size",
        "kv_chunk_size",
        "triangle_attention",
    }
)


def attend(
    module: nn.Module, heads: int, q_x: Tensor, kv_x: Tensor, mask: Tensor | None, bias: Tensor | None, wide: bool = False
) -> Tensor:
    """The module's projections around one call of the operator; in float32 if `wide`. All are [*, L, C]."""
    query, key, value = (
        heads_first(getattr(module, name)(x), heads)
        for name, x in (("linear_q", q_x), ("linear_k", kv_x), ("linear_v", kv_x))
    )
    gate = None if module.linear_g is None else heads_first(module.linear_g(q_x), heads)  # type: ignore[operator]
    dtype = query.dtype
    if wide:
        query, key, value, gate = (x if x is None else x.float() for x in (query, key, value, gate))
    out = gated_attention(query, key, value, gate, bias, mask, masked_rows="mean").to(dtype)
    # The operator returns query's memory order, so flattening the heads makes no copy.
    result: Tensor = module.linear_o(out.transpose(-2, -3).flatten(-2))  # type: ignore[operator]
    return result


def forward(self: Any, q_x: Tensor, kv_x: Tensor, biases: list[Tensor] | None = None, *args: Any, **flags: Any) -> Any:
    # Positional flags have no names here; another flash mask, or batch dimensions that broadcast, are another call.
    covered = not args and not flags.get("use_flash") and flags.get("flash_mask") is None
    if not covered or q_x.shape[:-2] != kv_x.shape[:-2]:
        return self._original_forward(q_x, kv_x, biases, *args, **flags)
    wide = bool(flags.get("use_high_precision"))
    mask, bias = merge(biases or [], (self.no_heads, q_x.size(-2)), torch.float32 if wide else q_x.dtype)
    return attend(self, self.no_heads, q_x, kv_x, mask, bias, wide)


ADAPTERS = (
    Adapter(
        name="OpenFold Attention",
        class_names=frozenset({"Attention"}),
        first=("q_x", "kv_x", "biases"),
        others=ALGORITHMS | {"use_flash", "flash_mask", "use_high_precision"},
        attributes=("linear_q", "linear_k", "linear_v", "linear_g", "linear_o", "no_heads", "c_hidden"),
        forward=forward,
        helpers=("_prep_qkv", "_wrap_up"),
    ),
)
