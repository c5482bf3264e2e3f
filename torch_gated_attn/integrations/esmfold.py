# SPDX-License-Identifier: BSD-3-Clause
"""ESMFold in Hugging Face transformers: `EsmFoldAttention` (the triangle attention's) and `EsmFoldSelfAttention`.

`EsmFoldSelfAttention` returns its attention maps beside the result; replaced, it returns None in their place, because the
maps are what the operator avoids. ESMFold itself does not use them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import gated_attention
from . import openfold
from ._adapter import Adapter
from ._biases import heads_first

__all__ = ["ADAPTERS"]


def _self_attention(
    self: Any, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, indices: Any = None
) -> tuple[Tensor, Tensor | None]:
    packed = heads_first(self.proj(x), self.num_heads)  # [B, H, L, 3 * D]
    query, key, value = packed.chunk(3, dim=-1)
    gate = heads_first(self.g_proj(x), self.num_heads) if self.gated else None
    if bias is not None:
        bias = bias.permute(0, 3, 1, 2).to(query.dtype)  # [B, Q, K, H] -> [B, H, Q, K]
    out = gated_attention(
        query,
        key,
        value,
        gate,
        bias,
        None if mask is None else mask.bool()[:, None, None],  # [B, K]; the original hides what equals 0
        scale=self.rescale_factor,
        masked_rows="mean",
    )
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


ADAPTERS = (
    Adapter(
        name="ESMFold EsmFoldAttention",
        class_names=frozenset({"EsmFoldAttention"}),
        first=("q_x", "kv_x", "biases"),
        others=openfold.ALGORITHMS | {"use_flash", "flash_mask"},
        attributes=("linear_q", "linear_k", "linear_v", "linear_g", "linear_o", "no_heads", "c_hidden"),
        forward=openfold.forward,
        helpers=("_prep_qkv", "_wrap_up"),
    ),
    Adapter(
        name="ESMFold EsmFoldSelfAttention",
        class_names=frozenset({"EsmFoldSelfAttention"}),
        first=("x", "mask", "bias", "indices"),
        others=frozenset(),
        attributes=("proj", "o_proj", "num_heads", "gated", "rescale_factor"),
        forward=_self_attention,
    ),
)
