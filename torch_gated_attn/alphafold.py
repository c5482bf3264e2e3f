# SPDX-License-Identifier: BSD-3-Clause
"""The attention modules of AlphaFold 2's Evoformer around :class:`GatedAttention`, and its published parameters in them.

Names follow Jumper et al. 2021, supplementary algorithms 7, 8, 13, 14 and 19; parameters are read from the arrays of the
`.npz` files, whose keys are `scope//name` and whose first dimension counts the blocks of a stack:

    params = np.load("params_model_1.npz")
    evoformer = "alphafold/alphafold_iteration/evoformer/evoformer_iteration"
    row = MSARowAttentionWithPairBias.from_alphafold(params, f"{evoformer}/msa_row_attention_with_pair_bias", block=0)

Masks are bool, True = exists; a mask of 0 and 1 is passed as `mask > 0`, an additive one (0 and -1e9) as `mask == 0`. Fully
masked rows give the mean of the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _arrays
from ._arguments import check_tensor
from ._linear import Linear, haiku_limit
from .module import GatedAttention

__all__ = [
    "MSAColumnAttention",
    "MSAColumnGlobalAttention",
    "MSARowAttentionWithPairBias",
    "TriangleAttention",
    "load_scope",
]

_M = TypeVar("_M", bound=nn.Module)

# Shapes of the arrays of each module, in the letters of `_arrays`; the attention is over its own input.
_ATTENTION = {
    f"attention//{name}": shape.replace("M", "A").replace("O", "A") for name, shape in _arrays.ATTENTION_SHAPES.items()
}
_GLOBAL_ATTENTION = {**_ATTENTION, "attention//key_w": "AD", "attention//value_w": "AD", "attention//gating_w": "AHD"}
_GLOBAL_ATTENTION |= {"attention//gating_b": "HD", "attention//output_w": "HDA"}
_QUERY_NORM = {"query_norm//scale": "A", "query_norm//offset": "A"}
_PAIR = {"feat_2d_norm//scale": "P", "feat_2d_norm//offset": "P", "/feat_2d_weights": "PH"}
_PARAMETERS = {
    "query_norm.weight": "query_norm//scale",
    "query_norm.bias": "query_norm//offset",
    "pair_norm.weight": "feat_2d_norm//scale",
    "pair_norm.bias": "feat_2d_norm//offset",
    "pair_bias.weight": "/feat_2d_weights",
}


class MSARowAttentionWithPairBias(nn.Module):
    r"""Within each sequence, biased by the pair representation (algorithm 7).

    Args:
        msa_dim, pair_dim: channels of the representations.
        num_heads: number of heads; a head has msa_dim / num_heads channels.
        zero_init, device, dtype: as of :class:`GatedAttention`.

    Shapes:
        - msa: [\*, S, L, msa_dim]
        - mask: bool, [\*, S, L]
        - pair: [\*, L, L, pair_dim]
        - result: [\*, S, L, msa_dim], to be added to `msa`
    """

    def __init__(
        self,
        msa_dim: int,
        pair_dim: int,
        num_heads: int,
        *,
        zero_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(msa_dim, device=device, dtype=dtype)
        self.pair_norm = nn.LayerNorm(pair_dim, device=device, dtype=dtype)
        self.pair_bias = Linear(pair_dim, num_heads, std=pair_dim**-0.5, device=device, dtype=dtype)
        self.attention = GatedAttention(msa_dim, num_heads, zero_init=zero_init, device=device, dtype=dtype)

    def forward(self, msa: Tensor, mask: Tensor | None, pair: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_tensor("msa", msa)
            check_tensor("mask", mask, optional=True)
            check_tensor("pair", pair)
        bias = _heads_first(self.pair_bias(self.pair_norm(pair)))  # [*, 1, H, L, L], shared by all sequences
        result: Tensor = self.attention(self.query_norm(msa), None, _key_mask(mask, False), bias)
        return result

    @classmethod
    def from_alphafold(cls, params: Mapping[str, Any], scope: str, block: int | None = None) -> MSARowAttentionWithPairBias:
        """From arrays under `scope`, e.g. ".../msa_row_attention_with_pair_bias"; see `load_scope` for the arguments."""
        arrays, size = _read(cls, params, scope, block, {**_ATTENTION, **_QUERY_NORM, **_PAIR})
        return _load(cls(size["A"], size["P"], size["H"], dtype=arrays["attention//query_w"].dtype), arrays)


class MSAColumnAttention(nn.Module):
    r"""Within each column, over the sequences (algorithm 8).

    Args:
        msa_dim: channels of the MSA representation.
        num_heads: number of heads.
        zero_init, device, dtype: as of :class:`GatedAttention`.

    Shapes: msa [\*, S, L, msa_dim], mask bool [\*, S, L]; result as msa, to be added to it.
    """

    def __init__(
        self,
        msa_dim: int,
        num_heads: int,
        *,
        zero_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(msa_dim, device=device, dtype=dtype)
        self.attention = GatedAttention(msa_dim, num_heads, zero_init=zero_init, device=device, dtype=dtype)

    def forward(self, msa: Tensor, mask: Tensor | None = None) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_tensor("msa", msa)
            check_tensor("mask", mask, optional=True)
        columns = self.query_norm(msa.transpose(-2, -3))  # [*, L, S, C]
        result: Tensor = self.attention(columns, None, _key_mask(mask, True))
        return result.transpose(-2, -3)

    @classmethod
    def from_alphafold(cls, params: Mapping[str, Any], scope: str, block: int | None = None) -> MSAColumnAttention:
        """From arrays under `scope`, e.g. ".../msa_column_attention"; see `load_scope` for the arguments."""
        arrays, size = _read(cls, params, scope, block, {**_ATTENTION, **_QUERY_NORM})
        return _load(cls(size["A"], size["H"], dtype=arrays["attention//query_w"].dtype), arrays)


class MSAColumnGlobalAttention(nn.Module):
    r"""Within each column of the extra MSA: one averaged query per head, one key and value for all heads (algorithm 19).

    Args:
        msa_dim: channels of the MSA representation.
        num_heads: number of heads; a head has msa_dim / num_heads channels.
        device, dtype: of the parameters.

    Shapes: msa [\*, S, L, msa_dim], mask bool [\*, S, L]; result as msa, to be added to it.
    """

    def __init__(
        self,
        msa_dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, but is {num_heads}")
        if msa_dim % num_heads != 0:
            raise ValueError(f"msa_dim must be divisible by num_heads {num_heads}, but is {msa_dim}")
        self.num_heads, self.head_dim = num_heads, msa_dim // num_heads

        def linear(outputs: int, limit: float = 0.0, bias: float | None = None) -> Linear:
            return Linear(msa_dim, outputs, limit=limit, bias=bias, device=device, dtype=dtype)

        self.query_norm = nn.LayerNorm(msa_dim, device=device, dtype=dtype)
        self.linear_q = linear(msa_dim, haiku_limit(msa_dim, num_heads, self.head_dim))
        shared = haiku_limit(1, msa_dim, self.head_dim)  # weights without a dimension of heads
        self.linear_k, self.linear_v = linear(self.head_dim, shared), linear(self.head_dim, shared)
        self.linear_g, self.linear_o = linear(msa_dim, bias=1.0), linear(msa_dim, bias=0.0)

    def forward(self, msa: Tensor, mask: Tensor | None = None) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_tensor("msa", msa)
            check_tensor("mask", mask, optional=True)
        columns = self.query_norm(msa.transpose(-2, -3))  # [*, L, S, C]
        query = self._split(self.linear_q(_average(columns, mask)))  # [*, L, H, 1, D]
        key, value = self.linear_k(columns).unsqueeze(-3), self.linear_v(columns).unsqueeze(-3)  # [*, L, 1, S, D]
        attended = torch.ops.torch_gated_attn.gated_attention(
            query, key, value, None, None, _key_mask(mask, True), scale=None, masked_rows="mean"
        )
        # Each head has one result, which every sequence gates for itself.
        gated = attended * torch.sigmoid(self._split(self.linear_g(columns)))  # [*, L, H, S, D]
        result: Tensor = self.linear_o(gated.transpose(-2, -3).flatten(-2))
        return result.transpose(-2, -3)

    def _split(self, x: Tensor) -> Tensor:
        # By the size of a head: where linear_q and linear_g are split over processes, x has some of the heads.
        return torch.unflatten(x, -1, [-1, self.head_dim]).transpose(-2, -3)

    @classmethod
    def from_alphafold(cls, params: Mapping[str, Any], scope: str, block: int | None = None) -> MSAColumnGlobalAttention:
        """From arrays under `scope`, e.g. ".../msa_column_global_attention"; see `load_scope` for the arguments."""
        arrays, size = _read(cls, params, scope, block, {**_GLOBAL_ATTENTION, **_QUERY_NORM})
        return _load(cls(size["A"], size["H"], dtype=arrays["attention//query_w"].dtype), arrays)


class TriangleAttention(nn.Module):
    r"""Over the pairs that share a residue, biased by the third side of the triangle (algorithms 13 and 14).

    Args:
        pair_dim: channels of the pair representation.
        num_heads: number of heads.
        starting: attend within rows, around the starting node; otherwise within columns, around the ending node.
        zero_init, device, dtype: as of :class:`GatedAttention`.

    Shapes: pair [\*, L, L, pair_dim], mask bool [\*, L, L]; result as pair, to be added to it.
    """

    def __init__(
        self,
        pair_dim: int,
        num_heads: int,
        *,
        starting: bool = True,
        zero_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.starting = starting
        self.query_norm = nn.LayerNorm(pair_dim, device=device, dtype=dtype)
        self.pair_bias = Linear(pair_dim, num_heads, std=pair_dim**-0.5, device=device, dtype=dtype)
        self.attention = GatedAttention(pair_dim, num_heads, zero_init=zero_init, device=device, dtype=dtype)

    def forward(self, pair: Tensor, mask: Tensor | None = None) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_tensor("pair", pair)
            check_tensor("mask", mask, optional=True)
        if not self.starting:
            pair = pair.transpose(-2, -3)
        rows = self.query_norm(pair)
        visible = _key_mask(mask, not self.starting)
        result: Tensor = self.attention(rows, None, visible, _heads_first(self.pair_bias(rows)))
        return result if self.starting else result.transpose(-2, -3)

    @classmethod
    def from_alphafold(cls, params: Mapping[str, Any], scope: str, block: int | None = None) -> TriangleAttention:
        """From arrays under `scope`, which ends in "triangle_attention_starting_node" or "triangle_attention_ending_node";
        see `load_scope` for the arguments."""
        if not scope.endswith(("starting_node", "ending_node")):
            raise ValueError(f'scope must end in "starting_node" or "ending_node", but is "{scope}"')
        arrays, size = _read(cls, params, scope, block, {**_ATTENTION, **_QUERY_NORM, "/feat_2d_weights": "AH"})
        starting = scope.endswith("starting_node")
        return _load(cls(size["A"], size["H"], starting=starting, dtype=arrays["attention//query_w"].dtype), arrays)


def load_scope(params: Mapping[str, Any], scope: str, block: int | None = None) -> dict[str, Tensor]:
    """The arrays under one scope of AlphaFold's parameters, as tensors under the rest of their names.

    Args:
        params: `numpy.load` of a parameter file, or any mapping with its keys.
        scope: the module's scope, without a slash at its end.
        block: which block of a stack, the first dimension of every array; None if the arrays are not stacked.
    """
    names = [name for name in params if name.startswith(f"{scope}/")]
    if not names:
        raise KeyError(f'scope must be one of params, but nothing is under "{scope}"')
    arrays = {name[len(scope) + 1 :]: params[name] for name in names}
    tensors = {name: _arrays.as_tensor(name, array) for name, array in arrays.items()}
    return tensors if block is None else {name: _block(name, array, block) for name, array in tensors.items()}


def _block(name: str, array: Tensor, block: int) -> Tensor:
    if array.dim() == 0:
        raise ValueError(f"{name} must have a first dimension of blocks, but has no dimension")
    if not 0 <= block < array.size(0):
        raise ValueError(f"block must be between 0 and {array.size(0) - 1}, but is {block}")
    return array[block]


# Two functions that torch.fx leaves as calls: they look at None, which a graph cannot.


def _key_mask(mask: Tensor | None, transposed: bool) -> Tensor | None:
    """[*, R, K], or [*, K, R], -> [*, R, 1, 1, K]: the keys of each row, for all heads and queries."""
    if mask is None:
        return None
    return (mask.transpose(-1, -2) if transposed else mask).unsqueeze(-2).unsqueeze(-2)


def _average(columns: Tensor, mask: Tensor | None) -> Tensor:
    """Over the sequences of [*, L, S, C] that exist by mask [*, S, L]: [*, L, 1, C]."""
    if mask is None:
        return columns.mean(-2, keepdim=True)
    weight = mask.transpose(-1, -2).unsqueeze(-1).to(columns.dtype)  # [*, L, S, 1]
    return (columns * weight).sum(-2, keepdim=True) / (weight.sum(-2, keepdim=True) + 1e-10)  # AlphaFold's


torch.fx.wrap("_key_mask")
torch.fx.wrap("_average")


def _heads_first(bias: Tensor) -> Tensor:
    """[*, L, L, H] -> [*, 1, H, L, L]: the same for all rows, a view."""
    return bias.movedim(-1, -3).unsqueeze(-4)


def _read(
    cls: type[nn.Module], params: Mapping[str, Any], scope: str, block: int | None, shapes: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The arrays under `scope`, which are those of `shapes`, and their sizes by letter."""
    arrays = load_scope(params, scope, block)
    for differs, names in (("also holds", arrays.keys() - shapes), ("lacks", shapes.keys() - arrays)):
        if names:
            raise ValueError(f"scope must hold the arrays of a {cls.__name__}, but {differs} {', '.join(sorted(names))}")
    return arrays, _arrays.match(arrays, shapes)


def _load(module: _M, arrays: Mapping[str, Tensor]) -> _M:
    inner = {name.removeprefix("attention//"): array for name, array in arrays.items() if name.startswith("attention//")}
    names = {parameter: name for parameter, name in _PARAMETERS.items() if name in arrays}
    if hasattr(module, "attention"):
        module.attention = GatedAttention.from_alphafold(inner)  # of the arrays' sizes, which need not add up to msa_dim
    else:
        names |= {parameter: f"attention//{name}" for parameter, name in _arrays.ATTENTION.items()}
    _arrays.load(module, arrays, names)
    return module
