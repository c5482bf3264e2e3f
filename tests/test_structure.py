# SPDX-License-Identifier: BSD-3-Clause
"""Causal calls, sliding windows, key lengths: the masks they stand for, and which core computes them."""

from __future__ import annotations

import pytest
import torch
from inputs import Inputs, draw, evaluate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_gated_attn._structure import structure_mask

import torch_gated_attn
from torch_gated_attn import _core, gated_attention, reference

SIZES = [(1, 1), (5, 5), (1, 7), (3, 7), (7, 3), (4, 0)]


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("window", [None, 1, 2, 100])
@pytest.mark.parametrize("lengths", [None, [0, 2, 7]])
def test_masks_say_what_the_definition_says(queries, keys, window, lengths):
    for is_causal in (True, False) if window is None else (True,):
        tensor = None if lengths is None else torch.tensor(lengths)
        mask = structure_mask(queries, keys, is_causal=is_causal, window=window, key_lengths=tensor)
        for batch, length in enumerate(lengths or [keys]):
            for i in range(queries):
                position = keys - queries + i
                for j in range(keys):
                    visible = j < length
                    if is_causal:
                        visible = visible and j <= position and (window is None or position - j < window)
                    full = torch.ones(1).bool() if mask is None else mask.expand(len(lengths or [0]), 1, queries, keys)
                    assert (True if mask is None else bool(full[batch, 0, i, j])) == visible


def test_masks_are_as_small_as_can_be():
    lengths = torch.tensor([[1, 2, 3]])
    assert structure_mask(5, 7) is None
    assert structure_mask(1, 7, is_causal=True) is None, "the last query sees every key"
    assert structure_mask(1, 7, is_causal=True, window=7) is None
    assert structure_mask(1, 7, is_causal=True, window=6).shape == (1, 7)
    assert structure_mask(5, 7, is_causal=True).shape == (5, 7)
    assert structure_mask(5, 7, key_lengths=lengths).shape == (1, 3, 1, 1, 7)
    assert structure_mask(1, 7, is_causal=True, key_lengths=lengths).shape == (1, 3, 1, 1, 7)
    assert structure_mask(5, 7, is_causal=True, key_lengths=lengths).shape == (1, 3, 1, 5, 7)


CALLS = {
    "causal": {"is_causal": True},
    "causal, fewer queries": {"q": 4, "is_causal": True},
    "causal, more queries": {"q": 15, "is_causal": True},
    "window": {"is_causal": True, "window": 3},
    "window as long as the keys": {"is_causal": True, "window": 11},
    "lengths": {"key_lengths": [3, 11]},
    "causal and lengths": {"is_causal": True, "key_lengths": [3, 0]},
    "causal, bias": {"is_causal": True, "bias": "full"},
    "causal, mask": {"is_causal": True, "mask": "key"},
    "causal, mean": {"q": 15, "is_causal": True, "masked_rows": "mean"},
    "causal, grouped heads": {"is_causal": True, "heads": 4, "kv_heads": 2},
    "causal, head_dim 256": {"is_causal": True, "heads": 4, "kv_heads": 1, "d": 256},
    "head_dim 256": {"d": 256, "bias": "full"},
    "causal, no batch": {"is_causal": True, "batch": ()},
    "causal, two batch dimensions": {"is_causal": True, "batch": (2, 3), "kv_heads": 1},
    "causal, scale": {"is_causal": True, "scale": 0.7},
    "causal, no gate": {"is_causal": True, "gate": None},
    "causal, gate per head": {"is_causal": True, "gate": "head"},
    "causal, Dv": {"is_causal": True, "dv": 5},
}


def make(device: str, dtype: torch.dtype, **changes) -> tuple[Inputs, dict[str, object]]:
    structure = {name: changes.pop(name) for name in ("is_causal", "window", "key_lengths") if name in changes}
    if "key_lengths" in structure:
        structure["key_lengths"] = torch.tensor(structure["key_lengths"], device=device)
    inputs = draw(
        **{"seed": 1, "device": device, "dtype": dtype, "q": 11, "bias": None, "mask": None, "lse": False, **changes}
    )
    return inputs, structure


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_reference_with_the_mask_written_out(device, name, dtype, deterministic):
    inputs, structure = make(device, dtype, **CALLS[name])
    mask = structure_mask(inputs.query.size(-2), inputs.key.size(-2), device=device, **structure)
    both = mask if inputs.mask is None else inputs.mask if mask is None else mask & inputs.mask

    def ours(*args, **options):
        return gated_attention(*args, **options, **structure), torch.zeros(1)

    torch.use_deterministic_algorithms(deterministic)
    try:
        results = evaluate(ours, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = evaluate(reference.gated_attention_with_lse, inputs.to(torch.float64).replace(mask=both))
    for key in results.keys() - {"lse"}:
        torch.testing.assert_close(
            results[key], expected[key].to(dtype), rtol=2e-5, atol=2e-6 if dtype == torch.float32 else 1e-12, msg=key
        )


@pytest.mark.parametrize("name", ["causal", "causal, grouped heads", "causal, no batch", "causal, two batch dimensions"])
def test_pytorchs_attention_is_used_and_only_there(name, monkeypatch):
    inputs, structure = make("cpu", torch.float32, **CALLS[name])
    calls = []
    monkeypatch.setattr(_core, "sdpa", lambda *args: calls.append(args) or torch.ones(1))
    gated_attention(*inputs.tensors, **structure)
    assert len(calls) == 1
    gated_attention(*inputs.tensors)
    gated_attention(*(x if x is None else x.bfloat16() for x in inputs.tensors), **structure)
    assert len(calls) == 1


def test_choice_and_reason():
    query = torch.empty(2, 4, 9, 32)
    wide = torch.empty(2, 4, 9, 200)
    assert _core.choose(query, query, query) == ("fused", "the operator has a kernel for it")
    assert _core.choose(wide, wide, wide)[0] == "fused", "CPU kernels take any head_dim"
    causal = {"causal_only": True}
    assert _core.choose(query, query, query, **causal)[0] == "sdpa"
    assert _core.choose(query, query, query, masked_rows="mean", **causal) == ("fused", 'masked_rows is not "zero"')
    assert _core.choose(query, query, query[..., :8], **causal) == ("fused", "value's head_dim is not query's")
    with FakeTensorMode():
        wide = torch.empty(2, 4, 9, 200, device="cuda", dtype=torch.bfloat16)
        bias, mask = wide.new_empty(9, 9), wide.new_empty(9, 9, dtype=torch.bool)
        assert _core.choose(wide, wide, wide) == (
            "sdpa",
            "head_dim 200 is above 128, the widest fused CUDA kernel",
        )
        assert _core.choose(wide, wide, wide, bias)[0] == "sdpa"
        assert _core.choose(wide, wide, wide, None, mask)[0] == "sdpa"
        why = "the bias needs a gradient, has another dtype, or comes with a mask"
        assert _core.choose(wide, wide, wide, bias, mask) == ("fused", why)
        assert _core.choose(wide, wide, wide, bias.float()) == ("fused", why)
        assert _core.choose(wide, wide, wide, bias.requires_grad_()) == ("fused", why)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("terms", ["mask", "bias", "key mask"])
def test_pytorchs_attention_with_a_mask(terms, kv_heads):
    """The path of wide heads on a CUDA device, run here on the CPU."""
    for batch in ((2,), (), (2, 3)):
        inputs = draw(seed=2, batch=batch, heads=4, kv_heads=kv_heads, bias=None, mask=None, lse=False)
        inputs = inputs.replace(
            bias=torch.randn(9, 11) if terms == "bias" else None,
            mask={"mask": torch.rand(9, 11) < 0.7, "key mask": torch.rand(*batch, 1, 1, 11) < 0.7}.get(terms),
        )

        def ours(*args, scale, masked_rows):
            return _core.sdpa(*args, scale, False), torch.zeros(1)

        wrt = ("query", "key", "value", "gate")
        expected = evaluate(reference.gated_attention_with_lse, inputs, wrt)
        for key, result in evaluate(ours, inputs, wrt).items():
            if key != "lse":
                torch.testing.assert_close(result, expected[key], rtol=1e-4, atol=1e-5, msg=key)


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    inputs, structure = make("cpu", torch.float32, **CALLS["causal"])
    compiled = torch.compile(lambda *args: gated_attention(*args, **structure), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs.tensors), gated_attention(*inputs.tensors, **structure))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_func_transforms_take_the_operator():
    inputs, structure = make("cpu", torch.float32, **CALLS["causal"])
    query, key, value, gate, *_ = inputs.tensors

    def loss(x):
        return gated_attention(x, key, value, gate, **structure).square().sum()

    tangent = torch.ones_like(query)
    _, product = torch.func.jvp(loss, (query,), (tangent,))
    torch.testing.assert_close(product, (torch.func.grad(loss)(query) * tangent).sum(), rtol=1e-4, atol=1e-5)


ERRORS = {
    "window must be None without is_causal, but is 3": {"window": 3},
    "window must be at least 1, but is 0": {"is_causal": True, "window": 0},
    "key_lengths must be int32 or int64, but is torch.float32": {"key_lengths": torch.ones(2)},
    "key_lengths must have query's batch dimensions [2], but has shape [3]": {"key_lengths": torch.tensor([1, 2, 3])},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    inputs, _ = make("cpu", torch.float32)
    with pytest.raises((TypeError, ValueError)) as error:
        torch_gated_attn.gated_attention(*inputs.tensors, **ERRORS[message])
    assert str(error.value) == message
