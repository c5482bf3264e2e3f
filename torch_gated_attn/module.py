# SPDX-License-Identifier: BSD-3-Clause
"""The attention module of AlphaFold 2 around the operator: projections, one operator call, output projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _arrays, _context_parallel
from ._arguments import check_tensor
from ._linear import Linear, haiku_limit

__all__ = ["GatedAttention"]


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
        - key_lengths: int32 or int64, [\*]; with `is_causal` and `window` as in :func:`torch_gated_attn.gated_attention`
        - result: [\*, Q, output_dim]

    The state dict has `linear_q.weight`, `linear_k.weight`, `linear_v.weight`, `linear_g.weight`, `linear_g.bias`,
    `linear_o.weight`, `linear_o.bias`, with heads before the size of a head. Each of these layers has its own
    `reset_parameters`, AlphaFold's start. They may be split over processes by heads (`ColwiseParallel`, `linear_o`
    `RowwiseParallel`); `bias` and a mask with heads are then the process's part.
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

        head_dim, value_head_dim = self.key_dim // num_heads, self.value_dim // num_heads
        key_limit = haiku_limit(self.kv_dim, num_heads, head_dim)
        value_limit = haiku_limit(self.kv_dim, num_heads, value_head_dim)
        output_limit = 0.0 if zero_init else haiku_limit(num_heads, value_head_dim, self.output_dim)

        def linear(inputs: int, outputs: int, limit: float, bias: float | None) -> Linear:
            return Linear(inputs, outputs, limit=limit, bias=bias, device=device, dtype=dtype)

        self.linear_q = linear(
            self.q_dim, self.key_dim, haiku_limit(self.q_dim, num_heads, head_dim), 0.0 if q_bias else None
        )
        self.linear_k = linear(self.kv_dim, self.key_dim, key_limit, None)
        self.linear_v = linear(self.kv_dim, self.value_dim, value_limit, None)
        # sigmoid(1) everywhere
        self.linear_g = linear(self.q_dim, self.value_dim, 0.0, 1.0 if gate_bias else None) if gating else None
        self.linear_o = linear(self.value_dim, self.output_dim, output_limit, 0.0 if output_bias else None)

    def reset_parameters(self) -> None:
        """Initialise as AlphaFold does: the gate starts at sigmoid(1) everywhere, biases else at 0."""
        for layer in (self.linear_q, self.linear_k, self.linear_v, self.linear_g, self.linear_o):
            if layer is not None:
                layer.reset_parameters()

    def forward(
        self,
        q_data: Tensor,  # [*, Q, q_dim]
        m_data: Tensor | None = None,  # [*, K, kv_dim]
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        # By keyword in Python; TorchScript has no defaults for arguments that are keyword-only.
        is_causal: bool = False,
        window: int | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            _context_parallel.refuse()
            check_tensor("q_data", q_data)
            check_tensor("m_data", m_data, optional=True)
            check_tensor("mask", mask, optional=True)
            check_tensor("bias", bias, optional=True)
            check_tensor("key_lengths", key_lengths, optional=True)
        m_data = _checked_data(q_data, m_data, self.q_dim, self.kv_dim)
        mask = _mask_with_heads(mask, q_data)
        head_dim, value_head_dim = self.key_dim // self.num_heads, self.value_dim // self.num_heads
        query = self._split_heads(self.linear_q(q_data), head_dim)  # [*, H, Q, D]
        key = self._split_heads(self.linear_k(m_data), head_dim)  # [*, H, K, D]
        value = self._split_heads(self.linear_v(m_data), value_head_dim)  # [*, H, K, Dv]
        gate: Tensor | None = None
        if self.linear_g is not None:
            gate = self._split_heads(self.linear_g(q_data), value_head_dim)  # [*, H, Q, Dv]
        _check_heads(query, key, bias, mask, self.num_heads)
        out = torch.ops.torch_gated_attn.gated_attention(
            query,
            key,
            value,
            gate,
            bias,
            mask,
            scale=None,
            masked_rows=self.masked_rows,
            is_causal=is_causal,
            window=window,
            key_lengths=key_lengths,
        )
        # The operator returns query's memory order, so flattening the heads makes no copy.
        result: Tensor = self.linear_o(out.transpose(-2, -3).flatten(-2))
        return result

    def _split_heads(self, x: Tensor, head_dim: int) -> Tensor:
        # By the size of a head: where the projections are split over processes, x has some of the heads.
        heads = -1 if head_dim > 0 else self.num_heads
        return torch.unflatten(x, -1, [heads, head_dim]).transpose(-2, -3)

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
                gating, gating_w [A, H, Dv] and gating_b [H, Dv]; tensors, NumPy arrays of any byte order (bfloat16 as of
                ml_dtypes), or anything `numpy.asarray` takes.
            masked_rows: as in the constructor.
            device, dtype: of the parameters; by default the CPU and the dtype of query_w.

        Raises:
            TypeError: an array is not of float64, float32, bfloat16 or float16.
            ValueError: an array is missing, unknown or does not fit the others.
        """
        gating = "gating_w" in params or "gating_b" in params
        shapes = {n: shape for n, shape in _arrays.ATTENTION_SHAPES.items() if gating or not n.startswith("gating")}
        if set(params) != set(shapes):
            raise ValueError(f"params must have the keys {', '.join(sorted(shapes))}, but has {', '.join(sorted(params))}")
        arrays = {name: _arrays.as_tensor(name, array) for name, array in params.items()}
        sizes = _arrays.match(arrays, shapes)
        module = cls(
            sizes["A"],
            sizes["H"],
            kv_dim=sizes["M"],
            key_dim=sizes["H"] * sizes["D"],
            value_dim=sizes["H"] * sizes["V"],
            output_dim=sizes["O"],
            gating=gating,
            masked_rows=masked_rows,
            device=device,
            dtype=dtype or arrays["query_w"].dtype,
        )
        _arrays.load(module, arrays, {parameter: n for parameter, n in _arrays.ATTENTION.items() if n in arrays})
        return module


# What looks at shapes or at None stands in functions that torch.fx leaves as calls, so that a graph checks too.


def _checked_data(q_data: Tensor, m_data: Tensor | None, q_dim: int, kv_dim: int) -> Tensor:
    """`m_data`, or `q_data` in its place."""
    if m_data is None:
        if kv_dim != q_dim:
            raise ValueError(f"m_data must be given, as kv_dim {kv_dim} is not q_dim {q_dim}, but is None")
        m_data = q_data
    if q_data.dim() < 2 or q_data.size(-1) != q_dim:
        raise ValueError(f"q_data must have shape [*, Q, {q_dim}], but has shape {list(q_data.shape)}")
    if m_data.dim() < 2 or m_data.size(-1) != kv_dim:
        raise ValueError(f"m_data must have shape [*, K, {kv_dim}], but has shape {list(m_data.shape)}")
    return m_data


def _mask_with_heads(mask: Tensor | None, q_data: Tensor) -> Tensor | None:
    if mask is None:
        return None
    rank = q_data.dim()
    if mask.dim() == rank:
        return mask.unsqueeze(-3)
    if mask.dim() == rank + 1:
        return mask
    raise ValueError(
        f"mask must have q_data's rank {rank}, as [*, Q, K], or one more, as [*, H or 1, Q, K], "
        f"but has shape {list(mask.shape)}"
    )


def _check_heads(query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, num_heads: int) -> None:
    """What the operator takes for grouped heads, or cannot explain, where projections are split over processes."""
    heads = query.size(-3)
    if key.size(-3) != heads:
        raise ValueError(
            f"linear_k must be split over processes as linear_q is, which gives {heads} of {num_heads} heads, "
            f"but gives {key.size(-3)}"
        )
    if heads != num_heads:
        _check_local_heads("bias", bias, heads, num_heads)
        _check_local_heads("mask", mask, heads, num_heads)


def _check_local_heads(name: str, terms: Tensor | None, heads: int, num_heads: int) -> None:
    if terms is not None and terms.dim() > 2 and terms.size(-3) != 1 and terms.size(-3) != heads:
        raise ValueError(
            f"{name} must have the {heads} heads of {num_heads} that this process's projections give, or 1, "
            f"but has {terms.size(-3)}"
        )


torch.fx.wrap("_checked_data")
torch.fx.wrap("_mask_with_heads")
torch.fx.wrap("_check_heads")
