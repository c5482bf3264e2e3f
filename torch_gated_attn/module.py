# SPDX-License-Identifier: BSD-3-Clause
"""The attention module of AlphaFold 2 around the operator: projections, one operator call, output projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _context_parallel

__all__ = ["GatedAttention"]

# Haiku's names for the arrays of one AlphaFold `Attention` module, and their rank.
_ALPHAFOLD_RANKS = {"query_w": 3, "key_w": 3, "value_w": 3, "output_w": 3, "output_b": 1}
_ALPHAFOLD_GATING_RANKS = {"gating_w": 3, "gating_b": 2}


class GatedAttention(nn.Module):
    r"""Multi-head attention with a pair bias and a sigmoid gate, AlphaFold 2's ``Attention``.

    .. math::
        q, k, v &= W_q x,\; W_k m,\; W_v m \qquad g = \sigma(W_g x + b_g) \\
        y &= W_o \big(g \odot \mathrm{softmax}(q k^\top / \sqrt{d} + \mathrm{bias})\, v\big) + b_o

    The attention itself is one call of ``torch_gated_attn::gated_attention``. Source of the formula: Jumper et al.
    2021, supplementary algorithms 7, 8, 13 and 14.

    Args:
        q_dim: size of the last dimension of `q_data`.
        num_heads: number of heads.
        kv_dim: size of the last dimension of `m_data`; default `q_dim`.
        key_dim: total size of the query and key projections over all heads; default `q_dim`.
        value_dim: total size of the value projection over all heads; default `kv_dim`.
        output_dim: size of the last dimension of the result; default `q_dim`.
        gating: multiply the attention's result by a sigmoid gate computed from `q_data`.
        zero_init: start with a zero output projection, so that a residual block starts as the identity.
        q_bias, gate_bias, output_bias: whether `linear_q`, `linear_g` and `linear_o` have a bias.
        masked_rows: result for a query that may attend to no key, "mean" (what AlphaFold's additive -1e9 mask
            computes) or "zero".
        device, dtype: of the parameters.

    Shapes:
        - q_data: [\*, Q, q_dim]
        - m_data: [\*, K, kv_dim]; default `q_data`
        - mask: bool, True = attend; [\*, Q, K] or with a head dimension [\*, H, Q, K]; sizes of 1 broadcast
        - bias: broadcastable to [\*, H, Q, K]
        - result: [\*, Q, output_dim]

    The state dict has `linear_q.weight`, `linear_k.weight`, `linear_v.weight`, `linear_g.weight`, `linear_g.bias`,
    `linear_o.weight`, `linear_o.bias`, with heads before the size of a head.
    """

    def __init__(
        self,
        q_dim: int,
        num_heads: int,
        *,
        kv_dim: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        output_dim: int | None = None,
        gating: bool = True,
        zero_init: bool = True,
        q_bias: bool = False,
        gate_bias: bool = True,
        output_bias: bool = True,
        masked_rows: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.q_dim = q_dim
        self.num_heads = num_heads
        self.kv_dim = q_dim if kv_dim is None else kv_dim
        self.key_dim = q_dim if key_dim is None else key_dim
        self.value_dim = self.kv_dim if value_dim is None else value_dim
        self.output_dim = q_dim if output_dim is None else output_dim
        self.gating = gating
        self.zero_init = zero_init
        self.masked_rows = masked_rows
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, but is {num_heads}")
        for name, size in (("key_dim", self.key_dim), ("value_dim", self.value_dim)):
            if size % num_heads != 0:
                raise ValueError(f"{name} must be divisible by num_heads {num_heads}, but is {size}")
        if masked_rows not in ("zero", "mean"):
            raise ValueError(f'masked_rows must be "zero" or "mean", but is "{masked_rows}"')

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.linear_q = linear(self.q_dim, self.key_dim, q_bias)
        self.linear_k = linear(self.kv_dim, self.key_dim, False)
        self.linear_v = linear(self.kv_dim, self.value_dim, False)
        self.linear_g = linear(self.q_dim, self.value_dim, gate_bias) if gating else None
        self.linear_o = linear(self.value_dim, self.output_dim, output_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as AlphaFold does: the gate starts at sigmoid(1) everywhere, biases else at 0."""
        heads = self.num_heads
        for layer, head_dim in (
            (self.linear_q, self.key_dim // heads),
            (self.linear_k, self.key_dim // heads),
            (self.linear_v, self.value_dim // heads),
        ):
            _haiku_fan_average_(layer.weight, receptive=layer.in_features, fan_in=heads, fan_out=head_dim)
        if self.zero_init:
            nn.init.zeros_(self.linear_o.weight)
        else:
            _haiku_fan_average_(
                self.linear_o.weight, receptive=heads, fan_in=self.value_dim // heads, fan_out=self.output_dim
            )
        if self.linear_g is not None:
            nn.init.zeros_(self.linear_g.weight)
            if self.linear_g.bias is not None:
                nn.init.ones_(self.linear_g.bias)
        for layer in (self.linear_q, self.linear_o):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        q_data: Tensor,  # [*, Q, q_dim]
        m_data: Tensor | None = None,  # [*, K, kv_dim]
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            _context_parallel.refuse()
        if m_data is None:
            if self.kv_dim != self.q_dim:
                raise ValueError(f"m_data must be given, as kv_dim {self.kv_dim} is not q_dim {self.q_dim}, but is None")
            m_data = q_data
        if q_data.dim() < 2 or q_data.size(-1) != self.q_dim:
            raise ValueError(f"q_data must have shape [*, Q, {self.q_dim}], but has shape {list(q_data.shape)}")
        if m_data.dim() < 2 or m_data.size(-1) != self.kv_dim:
            raise ValueError(f"m_data must have shape [*, K, {self.kv_dim}], but has shape {list(m_data.shape)}")
        if mask is not None:
            mask = self._mask_with_heads(mask, q_data.dim())

        query = self._split_heads(self.linear_q(q_data), self.key_dim)  # [*, H, Q, D]
        key = self._split_heads(self.linear_k(m_data), self.key_dim)  # [*, H, K, D]
        value = self._split_heads(self.linear_v(m_data), self.value_dim)  # [*, H, K, Dv]
        gate: Tensor | None = None
        if self.linear_g is not None:
            gate = self._split_heads(self.linear_g(q_data), self.value_dim)  # [*, H, Q, Dv]
        out = torch.ops.torch_gated_attn.gated_attention(
            query, key, value, gate, bias, mask, scale=None, masked_rows=self.masked_rows
        )
        # The operator returns query's memory order, so flattening the heads makes no copy.
        result: Tensor = self.linear_o(out.transpose(-2, -3).flatten(-2))
        return result

    def _split_heads(self, x: Tensor, total: int) -> Tensor:
        # By the size of a head: a projection that is parallel over heads returns some of them.
        return torch.unflatten(x, -1, [-1, total // self.num_heads]).transpose(-2, -3)

    def _mask_with_heads(self, mask: Tensor, rank: int) -> Tensor:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = attend), but is {mask.dtype}: pass mask > 0")
        if mask.dim() == rank:
            return mask.unsqueeze(-3)
        if mask.dim() == rank + 1:
            return mask
        raise ValueError(
            f"mask must have q_data's rank {rank}, as [*, Q, K], or one more, as [*, H or 1, Q, K], "
            f"but has shape {list(mask.shape)}"
        )

    def extra_repr(self) -> str:
        sizes = f"q_dim={self.q_dim}, num_heads={self.num_heads}"
        for name, default in (("kv_dim", self.q_dim), ("key_dim", self.q_dim), ("value_dim", self.kv_dim)):
            if getattr(self, name) != default:
                sizes += f", {name}={getattr(self, name)}"
        if self.output_dim != self.q_dim:
            sizes += f", output_dim={self.output_dim}"
        return f"{sizes}, gating={self.gating}, masked_rows='{self.masked_rows}'"

    @classmethod
    def from_alphafold(
        cls,
        params: Mapping[str, Any],
        *,
        masked_rows: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GatedAttention:
        """Build a module from the arrays of one AlphaFold 2 `Attention` module.

        Args:
            params: query_w [A, H, D], key_w [M, H, D], value_w [M, H, Dv], output_w [H, Dv, O], output_b [O] and, with
                gating, gating_w [A, H, Dv] and gating_b [H, Dv]; NumPy arrays, or anything `numpy.asarray` takes, or
                tensors.
            masked_rows: as in the constructor.
            device, dtype: of the parameters; by default the CPU and the dtype of query_w.
        """
        gating = "gating_w" in params or "gating_b" in params
        ranks = {**_ALPHAFOLD_RANKS, **(_ALPHAFOLD_GATING_RANKS if gating else {})}
        if set(params) != set(ranks):
            raise ValueError(f"params must have the keys {', '.join(sorted(ranks))}, but has {', '.join(sorted(params))}")
        arrays = {name: _as_tensor(array) for name, array in params.items()}
        for name, rank in ranks.items():
            if arrays[name].dim() != rank:
                raise ValueError(f"{name} must have {rank} dimensions, but has shape {list(arrays[name].shape)}")

        q_dim, heads, head_dim = arrays["query_w"].shape
        kv_dim, _, value_head_dim = arrays["value_w"].shape
        output_dim = arrays["output_b"].shape[0]
        expected = {
            "key_w": [kv_dim, heads, head_dim],
            "value_w": [kv_dim, heads, value_head_dim],
            "gating_w": [q_dim, heads, value_head_dim],
            "gating_b": [heads, value_head_dim],
            "output_w": [heads, value_head_dim, output_dim],
        }
        for name, shape in expected.items():
            if name in arrays and list(arrays[name].shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape} to fit the other arrays, but has shape {list(arrays[name].shape)}"
                )

        module = cls(
            q_dim,
            heads,
            kv_dim=kv_dim,
            key_dim=heads * head_dim,
            value_dim=heads * value_head_dim,
            output_dim=output_dim,
            gating=gating,
            masked_rows=masked_rows,
            device=device,
            dtype=dtype or arrays["query_w"].dtype,
        )
        state = {
            "linear_q.weight": arrays["query_w"].flatten(1).T,
            "linear_k.weight": arrays["key_w"].flatten(1).T,
            "linear_v.weight": arrays["value_w"].flatten(1).T,
            "linear_o.weight": arrays["output_w"].flatten(0, 1).T,
            "linear_o.bias": arrays["output_b"],
        }
        if gating:
            state["linear_g.weight"] = arrays["gating_w"].flatten(1).T
            state["linear_g.bias"] = arrays["gating_b"].flatten()
        module.load_state_dict(state)
        return module


def _haiku_fan_average_(weight: Tensor, *, receptive: int, fan_in: int, fan_out: int) -> None:
    """Uniform variance scaling by the mean fan. Haiku multiplies both fans by the product of all leading dimensions of
    the (3-D) weight, its "receptive field", though nothing is a convolution here; the limit is part of AlphaFold."""
    fans = receptive * (fan_in + fan_out)
    limit = (6.0 / fans) ** 0.5 if fans > 0 else 0.0
    nn.init.uniform_(weight, -limit, limit)


def _as_tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    import numpy

    return torch.from_numpy(numpy.array(array))  # a copy: arrays of JAX are read-only
