# SPDX-License-Identifier: BSD-3-Clause
"""The attention modules of AlphaFold 2's Evoformer around :class:`GatedAttention`, and its published parameters in them.

Names follow Jumper et al. 2021, supplementary algorithms 7, 8, 13, 14 and 19; parameters are read from the arrays of the
`.npz` files, whose keys are `scope//name` and whose first dimension counts the blocks of a stack:

    params = np.load("params_model_1.npz")
    evoformer = "alphafold/alphafold_iteration/evoformer/evoformer_iteration"
    row = MSARowAttentionWithPairBias.from_alphafold(params, f"{evoformer}/msa_row_attention_with_pair_bias", block=0)

Masks are bool, True = exists; a mask of 0 and 1 is passed as `mask > 0`. Fully masked rows give the mean of the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .functional import gated_attention
from .module import GatedAttention, _as_tensor

__all__ = [
    "MSAColumnAttention",
    "MSAColumnGlobalAttention",
    "MSARowAttentionWithPairBias",
    "TriangleAttention",
    "load_scope",
]

_M = TypeVar("_M", bound=nn.Module)


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
        self.pair_bias = nn.Linear(pair_dim, num_heads, bias=False, device=device, dtype=dtype)
        self.attention = GatedAttention(msa_dim, num_heads, zero_init=zero_init, device=device, dtype=dtype)
        nn.init.normal_(self.pair_bias.weight, std=pair_dim**-0.5)

    def forward(self, msa: Tensor, mask: Tensor | None, pair: Tensor) -> Tensor:
        bias = _heads_first(self.pair_bias(self.pair_norm(pair)))  # [*, 1, H, L, L], shared by all sequences
        result: Tensor = self.attention(self.query_norm(msa), None, _key_mask(mask), bias)
        return result

    @classmethod
    def from_alphafold(cls, params: Mapping[str, Any], scope: str, block: int | None = None) -> MSARowAttentionWithPairBias:
        """From arrays under `scope`, e.g. ".../msa_row_attention_with_pair_bias"; see `load_scope` for the arguments."""
        arrays = load_scope(params, scope, block)
        query_w, pair_dim = arrays["attention//query_w"], arrays["/feat_2d_weights"].size(0)
        module = cls(query_w.size(0), pair_dim, query_w.size(1), dtype=query_w.dtype)
        _load_norm(module.query_norm, arrays, "query_norm")
        _load_norm(module.pair_norm, arrays, "feat_2d_norm")
        _load(module.pair_bias.weight, arrays.pop("/feat_2d_weights").T)
        module.attention = _load_attention(arrays)
        return _all_used(module, arrays)


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
        columns = self.query_norm(msa.transpose(-2, -3))  # [*, L, S, C]
        result: Tensor = self.attention(columns, None, _key_mask(None if mask is None else mask.transpose(-1, -2)))
        return result.transpose(-2, -3)

    @classmethod
    def from_alphafold(cls, params: Mapping[str, Any], scope: str, block: int | None = None) -> MSAColumnAttention:
        """From arrays under `scope`, e.g. ".../msa_column_attention"; see `load_scope` for the arguments."""
        arrays = load_scope(params, scope, block)
        query_w = arrays["attention//query_w"]
        module = cls(query_w.size(0), query_w.size(1), dtype=query_w.dtype)
        _load_norm(module.query_norm, arrays, "query_norm")
        module.attention = _load_attention(arrays)
        return _all_used(module, arrays)


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
        if msa_dim % num_heads != 0:
            raise ValueError(f"msa_dim must be divisible by num_heads {num_heads}, but is {msa_dim}")
        self.num_heads, head_dim = num_heads, msa_dim // num_heads

        def linear(outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(msa_dim, outputs, bias=bias, device=device, dtype=dtype)

        self.query_norm = nn.LayerNorm(msa_dim, device=device, dtype=dtype)
        self.linear_q, self.linear_k, self.linear_v = linear(msa_dim), linear(head_dim), linear(head_dim)
        self.linear_g, self.linear_o = linear(msa_dim, bias=True), linear(msa_dim, bias=True)
        for parameter in (self.linear_g.weight, self.linear_o.weight, self.linear_o.bias):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.linear_g.bias)

    def forward(self, msa: Tensor, mask: Tensor | None = None) -> Tensor:
        columns = self.query_norm(msa.transpose(-2, -3))  # [*, L, S, C]
        if mask is None:
            average = columns.mean(-2, keepdim=True)
        else:
            weight = mask.transpose(-1, -2).unsqueeze(-1).to(columns.dtype)  # [*, L, S, 1]
            average = (columns * weight).sum(-2, keepdim=True) / (weight.sum(-2, keepdim=True) + 1e-10)  # AlphaFold's
        query = self._split(self.linear_q(average))  # [*, L, H, 1, D]
        key, value = self.linear_k(columns).unsqueeze(-3), self.linear_v(columns).unsqueeze(-3)  # [*, L, 1, S, D]
        visible = None if mask is None else mask.transpose(-1, -2)[..., None, None, :]
        attended = gated_attention(query, key, value, None, None, visible, masked_rows="mean")
        # Each head has one result, which every sequence gates for itself.
        gated = attended * torch.sigmoid(self._split(self.linear_g(columns)))  # [*, L, H, S, D]
        result: Tensor = self.linear_o(gated.transpose(-2, -3).flatten(-2))
        return result.transpose(-2, -3)

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.num_heads, -1)).transpose(-2, -3)

    @classmethod
    def from_alphafold(cls, params: Mapping[str, Any], scope: str, block: int | None = None) -> MSAColumnGlobalAttention:
        """From arrays under `scope`, e.g. ".../msa_column_global_attention"; see `load_scope` for the arguments."""
        arrays = load_scope(params, scope, block)
        query_w = arrays["attention//query_w"]
        module = cls(query_w.size(0), query_w.size(1), dtype=query_w.dtype)
        _load_norm(module.query_norm, arrays, "query_norm")
        for layer, name in ((module.linear_q, "query_w"), (module.linear_g, "gating_w")):
            _load(layer.weight, arrays.pop(f"attention//{name}").flatten(1).T)
        _load(module.linear_k.weight, arrays.pop("attention//key_w").T)
        _load(module.linear_v.weight, arrays.pop("attention//value_w").T)
        _load(module.linear_o.weight, arrays.pop("attention//output_w").flatten(0, 1).T)
        _load(module.linear_g.bias, arrays.pop("attention//gating_b").flatten())
        _load(module.linear_o.bias, arrays.pop("attention//output_b"))
        return _all_used(module, arrays)


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
        self.pair_bias = nn.Linear(pair_dim, num_heads, bias=False, device=device, dtype=dtype)
        self.attention = GatedAttention(pair_dim, num_heads, zero_init=zero_init, device=device, dtype=dtype)
        nn.init.normal_(self.pair_bias.weight, std=pair_dim**-0.5)

    def forward(self, pair: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.starting:
            pair = pair.transpose(-2, -3)
            mask = None if mask is None else mask.transpose(-1, -2)
        rows = self.query_norm(pair)
        result: Tensor = self.attention(rows, None, _key_mask(mask), _heads_first(self.pair_bias(rows)))
        return result if self.starting else result.transpose(-2, -3)

    @classmethod
    def from_alphafold(cls, params: Mapping[str, Any], scope: str, block: int | None = None) -> TriangleAttention:
        """From arrays under `scope`, which ends in "triangle_attention_starting_node" or "triangle_attention_ending_node";
        see `load_scope` for the arguments."""
        if not scope.endswith(("starting_node", "ending_node")):
            raise ValueError(f'scope must end in "starting_node" or "ending_node", but is "{scope}"')
        arrays = load_scope(params, scope, block)
        query_w, starting = arrays["attention//query_w"], scope.endswith("starting_node")
        module = cls(query_w.size(0), query_w.size(1), starting=starting, dtype=query_w.dtype)
        _load_norm(module.query_norm, arrays, "query_norm")
        _load(module.pair_bias.weight, arrays.pop("/feat_2d_weights").T)
        module.attention = _load_attention(arrays)
        return _all_used(module, arrays)


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
    arrays = {name[len(scope) + 1 :]: _as_tensor(params[name]) for name in names}
    if block is not None:
        blocks = next(iter(arrays.values())).size(0)
        if not 0 <= block < blocks:
            raise ValueError(f"block must be between 0 and {blocks - 1}, but is {block}")
        arrays = {name: array[block] for name, array in arrays.items()}
    return arrays


def _key_mask(mask: Tensor | None) -> Tensor | None:
    """[*, R, K] -> [*, R, 1, 1, K]: the keys of each row, for all heads and queries."""
    return None if mask is None else mask[..., None, None, :]


def _heads_first(bias: Tensor) -> Tensor:
    """[*, L, L, H] -> [*, 1, H, L, L]: the same for all rows, a view."""
    return bias.movedim(-1, -3).unsqueeze(-4)


def _load(parameter: Tensor, array: Tensor) -> None:
    if parameter.shape != array.shape:
        raise ValueError(f"the array must have shape {list(parameter.shape)}, but has {list(array.shape)}")
    with torch.no_grad():
        parameter.copy_(array)


def _load_norm(norm: nn.LayerNorm, arrays: dict[str, Tensor], name: str) -> None:
    _load(norm.weight, arrays.pop(f"{name}//scale"))
    _load(norm.bias, arrays.pop(f"{name}//offset"))


def _load_attention(arrays: dict[str, Tensor]) -> GatedAttention:
    prefix = "attention//"
    names = [name for name in arrays if name.startswith(prefix)]
    return GatedAttention.from_alphafold({name[len(prefix) :]: arrays.pop(name) for name in names})


def _all_used(module: _M, arrays: dict[str, Tensor]) -> _M:
    if arrays:
        raise ValueError(f"scope must hold the arrays of a {type(module).__name__}, but also holds {', '.join(arrays)}")
    return module
