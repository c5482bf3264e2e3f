# SPDX-License-Identifier: BSD-3-Clause
"""The signatures of other kernels, against their formulas in float64; and transformers' registry."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from inputs import assert_same_with_gradients
from torch import Tensor

from torch_gated_attn.integrations import functions

B, N, H, L, D = 2, 5, 3, 7, 8


def normal(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


def visible_keys(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


def test_evoformer_attention():
    q, k, v = (normal(B, N, L, H, D) for _ in range(3))
    visible, pair = visible_keys(B, N, 1, 1, L), normal(B, 1, H, L, L)
    hidden = (visible.double() - 1) * 1e9

    def expected(*terms: Tensor) -> Tensor:
        logits = torch.einsum("bnqhd,bnkhd->bnhqk", q, k) * D**-0.5 + sum(terms)
        return torch.einsum("bnhqk,bnkhd->bnqhd", logits.softmax(-1), v)

    attention = functions.DS4Sci_EvoformerAttention
    assert_same_with_gradients(attention(q, k, v, [hidden, pair]), expected(hidden, pair), [q, k, v, pair])
    assert_same_with_gradients(attention(q, k, v, [hidden]), expected(hidden), [q, k, v])
    assert_same_with_gradients(attention(q, k, v, [None, pair]), expected(pair), [q, k, v, pair])
    assert_same_with_gradients(attention(q, k, v, []), expected(), [q, k, v])
    soft = normal(B, N, 1, 1, L)
    assert_same_with_gradients(attention(q, k, v, [soft, pair]), expected(soft, pair), [q, k, v, soft, pair])
    constant = soft.detach()  # not a mask: its numbers are small
    assert_same_with_gradients(attention(q, k, v, [constant, pair]), expected(constant, pair), [q, k, v, pair])
    biases = [hidden, pair]
    attention(q, k, v, biases)
    assert len(biases) == 2
    with pytest.raises(ValueError, match=r"^biases must hold at most 2 tensors, but holds 3$"):
        attention(q, k, v, [hidden, pair, pair])


def test_evoformer_attention_in_low_precision():
    q, k, v = (torch.randn(B, N, L, H, D, dtype=torch.bfloat16) for _ in range(3))
    pair = torch.randn(B, 1, H, L, L)
    assert functions.DS4Sci_EvoformerAttention(q, k, v, [None, pair.half()]).dtype == torch.bfloat16
    assert functions.DS4Sci_EvoformerAttention(q, k, v, [None, pair]).dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [(B,), ()])
def test_triangle_attention_of_cuequivariance(batch):
    q, k, v = (normal(*batch, N, H, L, D) for _ in range(3))
    bias, visible = normal(*batch, 1, H, L, L), visible_keys(*batch, N, 1, 1, L)

    def expected(mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("...qd,...kd->...qk", q, k) * scale + bias
        logits = torch.where(mask, logits, -1e9)
        return logits.softmax(-1) @ v, logits

    everything = torch.ones_like(visible)
    triangle = functions.triangle_attention
    assert_same_with_gradients(triangle(q, k, v, bias), expected(everything, D**-0.5)[0], [q, k, v, bias])
    assert_same_with_gradients(triangle(q, k, v, bias, visible, 0.3), expected(visible, 0.3)[0], [q, k, v, bias])
    assert torch.equal(triangle(q, k, v, bias, visible.int()), triangle(q, k, v, bias, visible))

    out, lse, largest = triangle(q, k, v, bias, visible, return_aux=True)
    true, logits = expected(visible, D**-0.5)
    torch.testing.assert_close(out, true)
    torch.testing.assert_close(lse.float(), logits.logsumexp(-1).float())
    torch.testing.assert_close(largest, logits.amax(-1).float())


def test_missing_leading_dimensions_of_cuequivariance():
    """Each tensor is raised to five dimensions for itself; the result has as many as q."""
    q, k, v = (normal(1, N, H, L, D) for _ in range(3))
    bias, mask = normal(1, 1, H, L, L), visible_keys(1, N, 1, 1, L)
    lengths = torch.randint(1, L + 1, (1, N, 1, 1, 1))
    triangle = functions.triangle_attention
    expected = triangle(q, k, v, bias, mask, return_aux=True), triangle(q, k, v, bias, kv_lengths=lengths)
    short = [x.squeeze(0) for x in (q, k, v, bias, mask, lengths)]
    for b, m, n in ((bias, mask, lengths), (bias, short[4], short[5]), (short[3], mask, lengths), short[3:]):
        results = triangle(*short[:3], b, m, return_aux=True)
        for result, true in zip(results, expected[0], strict=True):
            assert torch.equal(result, true.squeeze(0))
        assert torch.equal(triangle(*short[:3], b, kv_lengths=n), expected[1].squeeze(0))
    assert torch.equal(triangle(q, k, v, short[3], short[4]), expected[0][0])
    one_row = triangle(q[0, :1], k[0, :1], v[0, :1], bias, mask[:, :1])
    assert one_row.shape == (1, H, L, D)


@pytest.mark.parametrize("norm_kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("samples", [1, 3])
def test_pair_biased_attention_of_cuequivariance(samples, norm_kind):
    """Every option against the formula, where the mask is of a structure or of a sample, and the projected bias again."""
    width, pairs, inner = 10, 6, H * D
    single, z = normal(B * samples, L, width), normal(B, L, L, pairs)
    biased = norm_kind == "layer_norm"
    norms = {n: normal(s) for n, s in (("a", width), ("z", pairs), ("q", inner), ("k", inner))}
    shifts = {n: normal(*w.shape) if biased else None for n, w in norms.items()}
    weights = {n: normal(inner, width) for n in "qkvg"} | {"o": normal(width, inner), "z": normal(H, pairs)}
    biases = {n: normal(w.size(0)) for n, w in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        if biased:
            return torch.nn.functional.layer_norm(x, x.shape[-1:], norms[name], shifts[name], 1e-3)
        return torch.nn.functional.rms_norm(x, x.shape[-1:], norms[name], 1e-3)

    def expected(mask: Tensor) -> Tensor:
        a = norm(single, "a")
        q, k, v, g = (a @ weights[n].T + biases[n] for n in "qkvg")
        q, k, v = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in (norm(q, "q"), norm(k, "k"), v))
        bias = (norm(z, "z") @ weights["z"].T + biases["z"]).movedim(-1, 1).repeat_interleave(samples, 0)
        logits = q @ k.mT * 0.4 + bias + (1 - mask[:, None, None]) * -1e6
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) * g.sigmoid()
        return out @ weights["o"].T + biases["o"]

    projections = {f"w_proj_{n}": w for n, w in weights.items()} | {f"b_proj_{n}": b for n, b in biases.items()}
    options = {f"w_ln_{n}": w for n, w in norms.items()} | {f"b_ln_{n}": b for n, b in shifts.items()} | projections
    options |= {"num_heads": H, "eps": 1e-3, "attn_scale": 0.4, "norm_kind": norm_kind}
    attention = functions.attention_pair_bias
    wrt = [single, z, *norms.values(), *weights.values(), *(b for n, b in biases.items() if n not in "kz")]
    wrt += [b for n, b in shifts.items() if b is not None and n not in "zk"]  # those change no probability
    for mask in (visible_keys(B, L), visible_keys(B * samples, L)):
        repeated = mask.double().repeat_interleave(samples * B // mask.size(0), 0)
        for given in (mask, mask.double(), mask.int()):
            out, projected = attention(single, z, given, **options)
            assert projected is None
            assert_same_with_gradients(out, expected(repeated), wrt)
    out, projected = attention(single, z, None, **options, return_z_proj=True)
    assert_same_with_gradients(out, expected(torch.ones(1, L).double()), wrt)
    again, _ = attention(single, projected, None, **options, is_cached_z_proj=True)
    torch.testing.assert_close(again, out)
    lengths = torch.randint(1, L + 1, (B,))
    mask = torch.arange(L) < lengths[:, None]
    results = [attention(single, z, m, **options, kv_lengths=n)[0] for m, n in ((mask, None), (None, lengths))]
    assert torch.equal(*results)
    lengths[0] = 0
    nothing = attention(single, z, None, **options, kv_lengths=lengths)[0][:samples]
    torch.testing.assert_close(nothing, biases["o"].expand_as(nothing))


def test_what_the_pair_biased_attention_refuses():
    x, z, w = torch.ones(3, L, D), torch.ones(2, L, L, D), torch.ones(D, D)
    arguments = {"num_heads": 1, "w_ln_a": None, "b_ln_a": None, "w_proj_q": w, "b_proj_q": None, "w_proj_k": w}
    arguments |= {"w_proj_v": w, "w_proj_g": w, "w_proj_o": w}
    refused = {
        "kv_lengths must be None where mask is given, but both are tensors": {"mask": x[..., 0], "kv_lengths": x},
        'norm_kind must be "layer_norm" or "rms_norm", but is \'batch\'': {"norm_kind": "batch"},
        "w_proj_z must be a tensor where pair_repr is not projected yet, but is None": {},
        "single_repr must have a multiple of pair_repr's 2 entries, but has 3": {"w_proj_z": w},
    }
    for message, given in refused.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            functions.attention_pair_bias(x, z, **{"mask": None, **arguments, **given})


def test_key_lengths_of_cuequivariance():
    q, k, v = (normal(B, N, H, L, D) for _ in range(3))
    bias, lengths = normal(B, 1, H, L, L), torch.randint(1, L + 1, (B, N, 1, 1, 1), dtype=torch.int32)
    triangle = functions.triangle_attention
    mask = torch.arange(L) < lengths
    assert torch.equal(triangle(q, k, v, bias, kv_lengths=lengths), triangle(q, k, v, bias, mask))
    lengths[0, 2] = 0
    out, lse, largest = triangle(q, k, v, bias, kv_lengths=lengths, return_aux=True)
    for result in (out, lse, largest):
        assert (result[0, 2] == 0).all()
        assert (result[0, 1] != 0).all()
    with pytest.raises(ValueError, match=r"^kv_lengths must be None where mask is given, but both are tensors$"):
        triangle(q, k, v, bias, mask, kv_lengths=lengths)


def test_triangle_attention_of_trifast():
    q, k, v = (normal(B, H, L, L, D) for _ in range(3))
    b, hidden = normal(B, H, L, L), ~visible_keys(B, L, L)
    logits = torch.einsum("bhijd,bhikd->bhijk", q, k) * D**-0.5 + b[:, :, None]
    logits = logits.masked_fill(hidden[:, None, :, None], -1e9)
    expected = torch.einsum("bhijk,bhikd->bhijd", logits.softmax(-1), v)
    assert_same_with_gradients(functions.trifast_triangle_attention(q, k, v, b, hidden), expected, [q, k, v, b])
    with pytest.raises(TypeError, match=r"^mask must be bool \(True = hidden\), but is torch.float32$"):
        functions.trifast_triangle_attention(q, k, v, b, hidden.float())


@pytest.mark.parametrize("position_bias", [False, True])
@pytest.mark.parametrize("case", ["none", "boolean", "additive", "not causal", "static cache", "decoding"])
def test_attention_function_of_transformers(case, position_bias):
    """What transformers calls: grouped heads, its masks, its rule when there is none, and T5's bias."""
    queries = 1 if case == "decoding" else L
    q, k, v = normal(B, 4, queries, D), *(normal(B, 2, L + (case == "static cache") * 3, D) for _ in range(2))
    causal = torch.ones(queries, L, dtype=torch.bool).tril()
    mask = visible_keys(B, 1, 1, L) & causal
    mask[:, :, :, 0] = True
    given = {
        "boolean": mask,
        "additive": torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo(torch.float32).min),
    }
    module = SimpleNamespace(is_causal=case != "not causal")
    position = normal(1, 4, queries, k.size(2)) if position_bias else None
    options = {"scaling": 0.2, "position_bias": position}
    out, weights = functions._transformers_attention(module, q, k, v, given.get(case), **options)
    keys, values = (x[:, :, :L].repeat_interleave(2, 1) for x in (k, v))
    logits = q @ keys.mT * 0.2 + (position[..., :L] if position_bias else 0)
    if case in ("none", "static cache"):
        logits = logits.masked_fill(~causal, -torch.inf)
    elif case in given:
        logits = logits.masked_fill(~mask, -torch.inf)
    leaves = [q, k, v, position] if position_bias else [q, k, v]
    assert_same_with_gradients(out, (logits.softmax(-1) @ values).transpose(1, 2), leaves)
    assert weights is None


def test_what_the_attention_function_of_transformers_refuses():
    x = torch.ones(1, 1, 2, 8)
    for name, value in {"dropout": 0.1, "softcap": 30.0, "s_aux": x}.items():
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            functions._transformers_attention(SimpleNamespace(), x, x, x, None, **{name: value})


def test_a_transformers_model_runs_on_it():
    transformers = pytest.importorskip("transformers")
    functions.register_transformers()
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0  # padded on the left
    results = []
    for implementation in ("sdpa", "torch_gated_attn"):
        model.set_attn_implementation(implementation)
        results.append(model(tokens, attention_mask=mask).logits)
    torch.testing.assert_close(results[0][mask.bool()], results[1][mask.bool()], rtol=1e-4, atol=1e-5)
    model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
