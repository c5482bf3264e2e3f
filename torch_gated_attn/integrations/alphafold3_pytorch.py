# SPDX-License-Identifier: BSD-3-Clause
"""The package alphafold3-pytorch: `Attention` and `TriangleAttention`.

Replaced, a triangle attention does not repeat its bias for every row. Windows, soft clamping, memory keys and residual
values are other formulas; such modules are left, and calls with dropout keep the original forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..functional import gated_attention
from ._adapter import Adapter, has_hooks
from ._biases import heads_first, split

__all__ = ["ADAPTERS"]


def _project(self: Any, x: Tensor, context: Tensor, heads: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """query, key, value and, if there is one, gate of the `Attention` module, [*, H, L, D] by `heads`."""
    gate = () if self.to_gates is None else (self.to_gates[0](x),)
    return [heads(y) for y in (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1), *gate)]


def _attend(self: Any, projected: list[Tensor], bias: Tensor | None, mask: Tensor | None) -> Tensor:
    query, key, value = projected[:3]
    gate = projected[3] if len(projected) > 3 else None
    _, terms = split(None, bias, query.dtype)
    out = gated_attention(query, key, value, gate, terms, mask, scale=self.attend.scale, masked_rows="mean")
    result: Tensor = self.to_out(out.transpose(-2, -3).flatten(-2))
    return result


def _drops(self: Any) -> bool:
    return bool(self.attend.attn_dropout.training and self.attend.attn_dropout.p > 0)


def _forward(
    self: Any,
    seq: Tensor,
    mask: Tensor | None = None,
    context: Tensor | None = None,
    windowed_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    return_values: bool = False,
    value_residual: Tensor | None = None,
) -> Any:
    if windowed_mask is not None or value_residual is not None or _drops(self):
        return self._original_forward(seq, mask, context, windowed_mask, attn_bias, return_values, value_residual)
    projected = _project(self, seq, seq if context is None else context, self.split_heads)
    out = _attend(self, projected, attn_bias, None if mask is None else mask[:, None, None])  # [B, K]
    return (out, projected[2]) if return_values else out


def _triangle(
    self: Any, pairwise_repr: Tensor, mask: Tensor | None = None, return_values: bool = False, **kwargs: Any
) -> Any:
    if return_values or kwargs or _drops(self.attn):
        return self._original_forward(pairwise_repr, mask, return_values, **kwargs)
    pair = pairwise_repr.transpose(1, 2) if self.need_transpose else pairwise_repr
    bias = self.to_attn_bias(pair)  # [B, H, L, L]
    projected = _project(self.attn, pair, pair, lambda x: heads_first(x, bias.size(1)))  # [B, L, H, L, D]
    out = _attend(self.attn, projected, bias.unsqueeze(1), None if mask is None else mask[:, None, None, None])
    return self.dropout(out.transpose(1, 2) if self.need_transpose else out)


def _refuse(module: Any) -> str | None:
    attend, gates = module.attend, module.to_gates
    if gates is not None and not (len(gates) == 2 and isinstance(gates[1], nn.Sigmoid)):
        return "to_gates is not a projection and a sigmoid"
    other_formulas = {
        "local windows": attend.is_local_attn,
        "soft clamping": attend.enable_attn_softclamp,
        "memory keys": module.memory_kv is not None,
        "residual values": module.accept_value_residual,
    }
    return next((f"{name} are another formula" for name, used in other_formulas.items() if used), None)


def _refuse_triangle(module: Any) -> str | None:
    if has_hooks(module.attn):
        return "attn has hooks, which would not run"
    missing = [name for name in _ATTRIBUTES if not hasattr(module.attn, name)]
    return f"its attn has no {', '.join(missing)}" if missing else _refuse(module.attn)


_ATTRIBUTES = (
    "attend",
    "split_heads",
    "to_q",
    "to_kv",
    "to_out",
    "to_gates",
    "memory_kv",
    "accept_value_residual",
)

ADAPTERS = (
    Adapter(
        name="alphafold3-pytorch Attention",
        class_names=frozenset({"Attention"}),
        first=("seq", "mask", "context", "windowed_mask", "attn_bias", "return_values", "value_residual"),
        others=frozenset(),
        attributes=_ATTRIBUTES,
        forward=_forward,
        refuse=_refuse,
    ),
    Adapter(
        name="alphafold3-pytorch TriangleAttention",
        class_names=frozenset({"TriangleAttention"}),
        first=("pairwise_repr", "mask", "return_values"),
        others=frozenset(),
        attributes=("attn", "to_attn_bias", "need_transpose", "dropout"),
        forward=_triangle,
        refuse=_refuse_triangle,
    ),
)
