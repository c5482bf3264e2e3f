# SPDX-License-Identifier: BSD-3-Clause
"""Relations that hold exactly, whatever the numbers: between calls, and between the results of one call.

Where they compare bits they do so on a CPU, for shapes that keep the kernel the same.
"""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, Inputs, assert_identical, draw, evaluate

from torch_gated_attn import gated_attention, gated_attention_with_lse

SEEDS = range(4)


def results(inputs: Inputs) -> dict[str, torch.Tensor]:
    return evaluate(gated_attention_with_lse, inputs)


def shape_for(seed: int) -> dict[str, int]:
    q, k, d, dv = ((5, 9, 8, 8), (33, 64, 16, 7), (70, 129, 32, 32), (1, 200, 11, 24))[seed]
    return {"q": q, "k": k, "d": d, "dv": dv}


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, terms: float = 1.0) -> None:
    """Equal up to a few roundings of terms of the given size."""
    error, bound = (a.double() - b.double()).abs().max().item(), 16 * torch.finfo(dtype).eps * terms
    assert error <= bound


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_1_give_the_gate(device, dtype, seed):
    inputs = draw(seed=seed, dtype=dtype, device=device, **shape_for(seed))
    out = gated_attention(*inputs.replace(value=torch.ones_like(inputs.value)).tensors)
    close(out, torch.sigmoid(inputs.gate.double()), dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_added_to_a_row_of_the_bias_changes_only_lse(device, dtype, seed):
    inputs = draw(seed=seed, dtype=dtype, device=device, lse=False, **shape_for(seed))
    shift = torch.randn(*inputs.bias.shape[:-1], 1, generator=torch.Generator().manual_seed(seed)).to(inputs.bias)
    a, b = results(inputs), results(inputs.replace(bias=inputs.bias + shift))
    close(a["lse"] + shift[..., 0], b["lse"], dtype, 8)
    for name in a.keys() - {"lse"}:
        close(a[name], b[name], dtype, 8 * max(1, a[name].abs().max().item()))
    assert a["d_bias"].sum(-1).abs().max() <= 64 * torch.finfo(dtype).eps * a["d_bias"].abs().sum(-1).max()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_gradients_sum_to_the_gated_cotangents(device, dtype, seed):
    inputs = draw(seed=seed, dtype=dtype, device=device, **shape_for(seed))
    gated = inputs.grad_out * torch.sigmoid(inputs.gate)
    close(results(inputs)["d_value"].sum(-2), gated.sum(-2), dtype, gated.abs().sum(-2).max().item())


@pytest.mark.parametrize("seed", SEEDS)
def test_permuted_keys_queries_and_heads(device, seed):
    inputs = draw(seed=seed, device=device, heads=4, mask="full", **shape_for(seed))
    generator = torch.Generator().manual_seed(seed)
    base = results(inputs)

    def permute(dims: dict[str, int], order: torch.Tensor) -> None:
        moved = inputs.replace(**{name: getattr(inputs, name).index_select(dim, order) for name, dim in dims.items()})
        for name, result in results(moved).items():
            dim = dims.get(name, dims.get(name.removeprefix("d_")))
            if name in ("out", "lse"):
                dim = dims.get("grad_out" if name == "out" else "grad_lse")
            expected = base[name] if dim is None else base[name].index_select(dim, order)
            close(result, expected, torch.float32, 8 * max(1, expected.abs().max().item()))

    keys = torch.randperm(inputs.key.size(-2), generator=generator).to(device)
    permute({"key": 2, "value": 2, "bias": 3, "mask": 3}, keys)
    queries = torch.randperm(inputs.query.size(-2), generator=generator).to(device)
    permute({"query": 2, "gate": 2, "bias": 2, "mask": 2, "grad_out": 2, "grad_lse": 2}, queries)
    heads = torch.randperm(4, generator=generator).to(device)
    every = ("query", "key", "value", "gate", "bias", "mask", "grad_out", "grad_lse")
    permute(dict.fromkeys(every, 1), heads)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_move_between_query_and_scale(device, dtype, seed):
    inputs = draw(seed=seed, dtype=dtype, device=device, scale=0.25, **shape_for(seed))
    # Larger cotangents keep the gradients clear of float16's denormals, where a factor is not exact.
    inputs = inputs.replace(grad_out=inputs.grad_out * 256, grad_lse=inputs.grad_lse * 256)
    a, b = results(inputs), results(inputs.replace(query=inputs.query * 4, scale=0.0625))
    b["d_query"] *= 4
    assert_identical(a, b, "scale")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_entries_do_not_know_each_other(dtype, seed):
    inputs = draw(seed=seed, dtype=dtype, batch=(5,), **shape_for(seed))
    whole = results(inputs)
    for i in range(5):
        single = inputs.map(lambda x, i=i: x[i : i + 1])
        alone = results(single.replace(mask=inputs.mask[i : i + 1]))
        assert_identical(alone, {name: result[i : i + 1] for name, result in whole.items()}, f"entry {i}")


@pytest.mark.parametrize("row", [0, 7, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_know_each_other(dtype, row):
    """A row whose logits rise far above the others', key by key, changes no bit of any other row."""
    inputs = draw(seed=1, dtype=dtype, q=34, k=100, d=16)
    steep = inputs.bias.clone()
    steep[..., row, :] = torch.linspace(-40, 40, 100).to(dtype)
    a, b = results(inputs), results(inputs.replace(bias=steep))
    others = [i for i in range(34) if i != row]
    by_row = ("out", "lse", "d_query", "d_gate", "d_bias")
    assert not torch.equal(a["out"][:, :, row], b["out"][:, :, row])
    assert_identical(*({name: result[name][:, :, others] for name in by_row} for result in (a, b)), "other rows")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_appended_masked_keys_change_no_bit(dtype, seed):
    inputs = draw(seed=seed, dtype=dtype, **shape_for(seed))
    pad = torch.nn.functional.pad
    padded = inputs.replace(
        key=pad(inputs.key, (0, 0, 0, 3), value=2.0),
        value=pad(inputs.value, (0, 0, 0, 3), value=2.0),
        bias=pad(inputs.bias, (0, 3), value=2.0),
        mask=pad(inputs.mask, (0, 3), value=False),
    )
    k_len = inputs.key.size(-2)
    a, b = results(inputs), results(padded)
    for name in ("d_key", "d_value"):
        b[name] = b[name][..., :k_len, :]
    b["d_bias"] = b["d_bias"][..., :k_len]
    assert_identical(a, b, "appended keys")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_gradient_from_the_ungated_call(device, dtype):
    inputs = draw(seed=2, dtype=dtype, device=device, q=33, k=64, d=16)
    ungated = gated_attention(*inputs.replace(gate=None).tensors).double()
    gate = torch.sigmoid(inputs.gate.double())
    expected = inputs.grad_out.double() * ungated * gate * (1 - gate)
    close(results(inputs)["d_gate"], expected, dtype, inputs.grad_out.abs().max().item())


def test_parts_of_the_queries_equal_the_whole(device):
    inputs = draw(seed=3, device=device, q=70, k=64, d=16, mask="full")
    whole = results(inputs)
    by_query = ("query", "gate", "bias", "mask", "grad_out", "grad_lse")
    parts = [
        results(inputs.replace(**{name: getattr(inputs, name)[:, :, s] for name in by_query}))
        for s in (slice(0, 17), slice(17, 48), slice(48, 70))
    ]
    for name, result in whole.items():
        pieces = [part[name] for part in parts]
        joined = sum(pieces) if name in ("d_key", "d_value") else torch.cat(pieces, 2)
        close(joined, result, torch.float32, 8 * max(1, result.abs().max().item()))


def test_parts_of_the_keys_merge_through_lse(device):
    """What lse is for: two calls over halves of the keys give the whole, forward and backward."""
    inputs = draw(seed=4, dtype=torch.float64, device=device, q=33, k=64, d=16, mask="full", gate=None, lse=False)

    def merged(query, key, value, _, bias, mask, **options):
        parts = [
            gated_attention_with_lse(query, key[..., s, :], value[..., s, :], None, bias[..., s], mask[..., s], **options)
            for s in (slice(0, 27), slice(27, 64))
        ]
        lse = torch.stack([part[1] for part in parts])
        weights = torch.softmax(lse, dim=0).unsqueeze(-1)
        return sum(w * part[0] for w, part in zip(weights, parts, strict=True)), torch.logsumexp(lse, dim=0)

    inputs.mask[..., 0] = inputs.mask[..., 40] = True
    a, b = results(inputs), evaluate(merged, inputs)
    for name, result in a.items():
        torch.testing.assert_close(result, b[name], rtol=1e-10, atol=1e-12, msg=name)
