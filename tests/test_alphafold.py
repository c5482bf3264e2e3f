# SPDX-License-Identifier: BSD-3-Clause
"""AlphaFold 2's attention modules from arrays of the published names and shapes, against the formulas in float64 einsum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import assert_same_with_gradients
from torch import Tensor

from torch_gated_attn.alphafold import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    TriangleAttention,
)

EVOFORMER = "alphafold/alphafold_iteration/evoformer"
S, L = 6, 7  # the sizes below are those of the published files
BLOCKS = {"evoformer_iteration": 48, "extra_msa_stack": 4}


def attention_shapes(dim: int, heads: int, size: int) -> dict[str, tuple[int, ...]]:
    per_head = (dim, heads, size)
    return {
        "attention//query_w": per_head,
        "attention//key_w": per_head,
        "attention//value_w": per_head,
        "attention//gating_w": per_head,
        "attention//gating_b": (heads, size),
        "attention//output_w": (heads, size, dim),
        "attention//output_b": (dim,),
        "query_norm//scale": (dim,),
        "query_norm//offset": (dim,),
    }


SHAPES = {
    "evoformer_iteration/msa_row_attention_with_pair_bias": {
        **attention_shapes(256, 8, 32),
        "feat_2d_norm//scale": (128,),
        "feat_2d_norm//offset": (128,),
        "/feat_2d_weights": (128, 8),
    },
    "evoformer_iteration/msa_column_attention": attention_shapes(256, 8, 32),
    "evoformer_iteration/triangle_attention_starting_node": {**attention_shapes(128, 4, 32), "/feat_2d_weights": (128, 4)},
    "evoformer_iteration/triangle_attention_ending_node": {**attention_shapes(128, 4, 32), "/feat_2d_weights": (128, 4)},
    "extra_msa_stack/msa_column_global_attention": {
        **attention_shapes(64, 8, 8),
        "attention//key_w": (64, 8),
        "attention//value_w": (64, 8),
    },
}


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for scope, shapes in SHAPES.items():
        for name, shape in shapes.items():
            scale = shape[0] ** -0.5 if name.endswith(("_w", "weights")) else 1.0
            # A module's own arrays are "scope//name", those of a module inside it "scope/inner//name".
            arrays[f"{EVOFORMER}/{scope}/{name}"] = rng.standard_normal((BLOCKS[scope.split("/")[0]], *shape)) * scale
    return arrays


def normalised(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}//scale"] + p[f"{name}//offset"]


def attention(x: Tensor, visible: Tensor, p: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """[R, L, C] rows with keys visible [R, L]; `bias` is [H, L, L]."""
    w = {name.removeprefix("attention//"): array for name, array in p.items()}
    q, k, v = (torch.einsum("rla,ahc->rlhc", x, w[f"{name}_w"]) for name in ("query", "key", "value"))
    logits = torch.einsum("rqhc,rkhc->rhqk", q, k) * q.size(-1) ** -0.5
    logits = torch.where(visible[:, None, None], logits if bias is None else logits + bias, -1e9)
    out = torch.einsum("rhqk,rkhc->rqhc", logits.softmax(-1), v)
    out = out * torch.sigmoid(torch.einsum("rla,ahc->rlhc", x, w["gating_w"]) + w["gating_b"])
    return torch.einsum("rqhc,hco->rqo", out, w["output_w"]) + w["output_b"]


def global_attention(x: Tensor, visible: Tensor, p: dict[str, Tensor]) -> Tensor:
    w = {name.removeprefix("attention//"): array for name, array in p.items()}
    weight = visible.double()[..., None]
    average = (x * weight).sum(1) / (weight.sum(1) + 1e-10)
    q = torch.einsum("ra,ahc->rhc", average, w["query_w"])
    k, v = torch.einsum("rka,ac->rkc", x, w["key_w"]), torch.einsum("rka,ac->rkc", x, w["value_w"])
    logits = torch.where(visible[:, None], torch.einsum("rhc,rkc->rhk", q, k) * q.size(-1) ** -0.5, -1e9)
    out = torch.einsum("rhk,rkc->rhc", logits.softmax(-1), v)
    gate = torch.sigmoid(torch.einsum("rqa,ahc->rqhc", x, w["gating_w"]) + w["gating_b"])
    return torch.einsum("rqhc,hco->rqo", out[:, None] * gate, w["output_w"]) + w["output_b"]


def block_of(params: dict[str, np.ndarray], scope: str, block: int) -> dict[str, Tensor]:
    return {name: torch.from_numpy(params[f"{EVOFORMER}/{scope}/{name}"][block]) for name in SHAPES[scope]}


def inputs(dim: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, columns, dim, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(rows, columns) < 0.7
    mask[2] = False  # a row, and a column, without anything in it
    mask[:, 3] = False
    return x, mask


@pytest.mark.parametrize("block", [0, 2])
def test_row_attention_with_pair_bias(params, block):
    scope = "evoformer_iteration/msa_row_attention_with_pair_bias"
    module, p = (
        MSARowAttentionWithPairBias.from_alphafold(params, f"{EVOFORMER}/{scope}", block),
        block_of(params, scope, block),
    )
    msa, mask = inputs(256, S, L)
    pair = torch.randn(L, L, 128, dtype=torch.float64, requires_grad=True)
    bias = torch.einsum("qkc,ch->hqk", normalised(pair, p, "feat_2d_norm"), p["/feat_2d_weights"])
    expected = attention(normalised(msa, p, "query_norm"), mask, p, bias)
    assert_same_with_gradients(module(msa, mask, pair), expected, [msa, pair])
    assert torch.equal(module(msa, None, pair), module(msa, torch.ones_like(mask), pair))


def test_column_attention(params):
    scope = "evoformer_iteration/msa_column_attention"
    module, p = MSAColumnAttention.from_alphafold(params, f"{EVOFORMER}/{scope}", 1), block_of(params, scope, 1)
    msa, mask = inputs(256, S, L)
    expected = attention(normalised(msa.transpose(0, 1), p, "query_norm"), mask.T, p).transpose(0, 1)
    assert_same_with_gradients(module(msa, mask), expected, [msa])
    assert torch.equal(module(msa), module(msa, torch.ones_like(mask)))


def test_column_global_attention(params):
    scope = "extra_msa_stack/msa_column_global_attention"
    module, p = MSAColumnGlobalAttention.from_alphafold(params, f"{EVOFORMER}/{scope}", 1), block_of(params, scope, 1)
    msa, mask = inputs(64, S, L)
    expected = global_attention(normalised(msa.transpose(0, 1), p, "query_norm"), mask.T, p).transpose(0, 1)
    assert_same_with_gradients(module(msa, mask), expected, [msa])
    torch.testing.assert_close(module(msa), module(msa, torch.ones_like(mask)))


@pytest.mark.parametrize("node", ["starting", "ending"])
def test_triangle_attention(params, node):
    scope = f"evoformer_iteration/triangle_attention_{node}_node"
    module, p = TriangleAttention.from_alphafold(params, f"{EVOFORMER}/{scope}", 1), block_of(params, scope, 1)
    pair, mask = inputs(128, L, L)
    turn = (lambda x: x) if node == "starting" else (lambda x: x.transpose(0, 1))
    x = normalised(turn(pair), p, "query_norm")
    bias = torch.einsum("qkc,ch->hqk", x, p["/feat_2d_weights"])
    assert_same_with_gradients(module(pair, mask), turn(attention(x, turn(mask), p, bias)), [pair])


def test_any_number_of_batch_dimensions(params):
    scope = f"{EVOFORMER}/evoformer_iteration"
    pair, mask = torch.randn(2, 3, L, L, 128, dtype=torch.float64), torch.rand(2, 3, L, L) < 0.7
    msa, msa_mask = torch.randn(2, 3, S, L, 256, dtype=torch.float64), torch.rand(2, 3, S, L) < 0.7
    row = MSARowAttentionWithPairBias.from_alphafold(params, f"{scope}/msa_row_attention_with_pair_bias", 0)
    column = MSAColumnAttention.from_alphafold(params, f"{scope}/msa_column_attention", 0)
    ending = TriangleAttention.from_alphafold(params, f"{scope}/triangle_attention_ending_node", 0)
    for result, one in (
        (row(msa, msa_mask, pair), row(msa[1, 2], msa_mask[1, 2], pair[1, 2])),
        (column(msa, msa_mask), column(msa[1, 2], msa_mask[1, 2])),
        (ending(pair, mask), ending(pair[1, 2], mask[1, 2])),
    ):
        torch.testing.assert_close(result[1, 2], one)


def test_new_modules_are_the_identity_of_their_residual_block():
    msa, pair, mask = torch.randn(S, L, 16), torch.randn(L, L, 8), torch.ones(S, L, dtype=torch.bool)
    assert (MSARowAttentionWithPairBias(16, 8, 2)(msa, mask, pair) == 0).all()
    assert (MSAColumnAttention(16, 2)(msa, mask) == 0).all()
    assert (MSAColumnGlobalAttention(16, 2)(msa, mask) == 0).all()
    assert (TriangleAttention(8, 2)(pair) == 0).all()
    assert (TriangleAttention(8, 2, zero_init=False)(pair) != 0).any()


def test_parameters_that_are_not_stacked(params):
    scope = f"{EVOFORMER}/evoformer_iteration/msa_column_attention"
    one = {name: array[1] for name, array in params.items() if name.startswith(scope)}
    states = [MSAColumnAttention.from_alphafold(*args).state_dict() for args in ((one, scope), (params, scope, 1))]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_errors(params):
    column, row = (
        f"{EVOFORMER}/evoformer_iteration/msa_{kind}" for kind in ("column_attention", "row_attention_with_pair_bias")
    )
    with pytest.raises(KeyError, match='scope must be one of params, but nothing is under "nowhere"'):
        MSAColumnAttention.from_alphafold(params, "nowhere")
    with pytest.raises(ValueError, match="block must be between 0 and 47, but is 48"):
        MSAColumnAttention.from_alphafold(params, column, 48)
    with pytest.raises(
        ValueError, match=r"scope must hold the arrays of a MSAColumnAttention, but also holds .*, feat_2d_norm//scale"
    ):
        MSAColumnAttention.from_alphafold(params, row, 0)
    with pytest.raises(ValueError, match='scope must end in "starting_node" or "ending_node"'):
        TriangleAttention.from_alphafold(params, column, 0)
    with pytest.raises(ValueError, match="num_heads must be at least 1, but is 0"):
        MSAColumnGlobalAttention(16, 0)
    with pytest.raises(ValueError, match="msa_dim must be divisible by num_heads 3, but is 16"):
        MSAColumnGlobalAttention(16, 3)
    wrong = {name: array[..., :-1] if name.endswith("query_norm//scale") else array for name, array in params.items()}
    with pytest.raises(
        ValueError, match=r"query_norm//scale must have shape \[256\] to fit the other arrays, but has shape \[255\]"
    ):
        MSAColumnAttention.from_alphafold(wrong, column, 0)
