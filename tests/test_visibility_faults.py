# SPDX-License-Identifier: BSD-3-Clause
"""What once went wrong in causal calls and with many batch dimensions: each case is one that failed."""

from __future__ import annotations

import pytest
import torch
from inputs import draw, evaluate
from tolerance import Judge
from torch.utils.flop_counter import FlopCounterMode

from torch_gated_attn import explain, gated_attention, gated_attention_with_lse

CAUSAL = {"is_causal": True, "bias": None, "mask": None}

# Changes to the shapes query [1, 4, 40, 64] and key and value [1, 4, 40, 64] of a causal call, and the whole message.
WRONG_SHAPES = {
    "longer value": ({"value": (1, 4, 4000, 64)}, "value must have key's length 40, but has shape [1, 4, 4000, 64]"),
    "shorter value": ({"value": (1, 4, 7, 64)}, "value must have key's length 40, but has shape [1, 4, 7, 64]"),
    "value of another batch": (
        {"value": (2, 4, 40, 64)},
        "value must have query's batch dimensions [1], but has shape [2, 4, 40, 64]",
    ),
    "key of lower rank": (
        {"key": (4, 40, 64)},
        "key must have as many dimensions as query of shape [1, 4, 40, 64], but has shape [4, 40, 64]",
    ),
    "value of higher rank": (
        {"value": (1, 1, 4, 40, 64)},
        "value must have as many dimensions as query of shape [1, 4, 40, 64], but has shape [1, 1, 4, 40, 64]",
    ),
    "value of other heads": (
        {"value": (1, 2, 40, 64)},
        "value must have as many heads as key, 4, but has shape [1, 2, 40, 64]",
    ),
    "query of rank 2": (
        {"query": (40, 64)},
        "query must have at least 3 dimensions [*, H, Q, D], but has shape [40, 64]",
    ),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_wrong_shapes_of_causal_calls(name, requires_grad):
    """A value longer than the keys ended the process in the backward."""
    changes, message = WRONG_SHAPES[name]
    shapes = dict.fromkeys(("query", "key", "value"), (1, 4, 40, 64)) | changes
    tensors = {n: torch.randn(shape).requires_grad_(requires_grad) for n, shape in shapes.items()}
    for options in ({}, {"window": 3}, {"key_lengths": torch.tensor([3])}):
        with pytest.raises(ValueError, match="must have") as raised:
            gated_attention(**tensors, is_causal=True, **options)
        assert str(raised.value).split("\n")[0] == message


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-30, -1e3])
def test_scales_of_causal_calls(device, scale):
    judge = Judge()
    for q, k in ((3, 3), (40, 50)):
        judge.compare((q, scale), draw(seed=1, device=device, q=q, k=k, scale=scale, **CAUSAL))
    judge.verdict()


@pytest.mark.parametrize("q_shape", [(4, 0, 8), (2, 3, 4, 0, 8), (0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 5, 8)])
@pytest.mark.parametrize("keys", [0, 3])
def test_empty_causal_calls(device, q_shape, keys):
    query = torch.randn(q_shape, device=device).requires_grad_()
    key = torch.randn((*q_shape[:-2], keys, 8), device=device).requires_grad_()
    lengths = torch.zeros(q_shape[:-3], dtype=torch.int32, device=device)
    for options in ({}, {"window": 2}, {"key_lengths": lengths}):
        out, lse = gated_attention_with_lse(query, key, key, is_causal=True, **options)
        assert (out.shape, lse.shape) == (q_shape, q_shape[:-1])
        if keys == 0 or options.get("key_lengths") is not None:
            assert out.eq(0).all()
            assert lse.eq(-torch.inf).all()
        grads = torch.autograd.grad(out.sum(), (query, key))
        assert [g.shape for g in grads] == [query.shape, key.shape]
        assert all(g.isfinite().all() for g in grads)


def test_a_second_length_of_a_causal_graph():
    """Was "is_causal must be bool, not SymBool": q and k are equal, then not, then equal again."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: gated_attention(q, k, k, is_causal=True), fullgraph=True, backend="aot_eager")
    for q, k in ((5, 5), (9, 9), (1, 10), (1, 11), (12, 12)):
        call = draw(seed=q, q=q, k=k, **CAUSAL)
        assert torch.equal(compiled(call.query, call.key), gated_attention(call.query, call.key, call.key, is_causal=True))


def test_flops_and_second_derivatives_of_causal_calls(device):
    call = draw(seed=1, device=device, dtype=torch.float64, q=4, k=4, **CAUSAL)
    with FlopCounterMode(display=False) as counter:
        gated_attention(*call.tensors, is_causal=True)
    assert counter.get_total_flops() == 2 * 2 * 2 * 2 * 4 * 4 * 8
    query = call.query.detach().requires_grad_()
    (grad,) = torch.autograd.grad(gated_attention(query, *call.tensors[1:], is_causal=True).sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), query)
    assert second.any()


def test_explain_has_no_detour_for_causal_calls():
    query = torch.randn(2, 4, 40, 16)
    assert explain(query, query, query, is_causal=True).kernel == "query per lane"
    assert explain(query[:, :, :1], query, query, is_causal=True).kernel == "few queries"


# Five batch dimensions, of which every two neighbours are walked differently by some argument.
MANY_DIMS = (2, 3, 2, 1, 2, 2)
PATTERNS = {
    "bias": {"bias": (2, 1, 2, 1, 2, 1, 2, 5, 6)},
    "bias and mask": {"bias": (1, 3, 1, 1, 2, 1, 1, 5, 6), "mask": (2, 1, 1, 1, 2, 1, 1, 1, 6)},
    "gate": {"gate": (2, 1, 2, 1, 1, 2, 1, 5, 1)},
    "key lengths": {"bias": (2, 1, 2, 1, 2, 1, 2, 5, 6), "lengths": True, "is_causal": True},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batch_dimensions_that_do_not_merge(device, pattern, permuted, dtype):
    """More than kernels walk: first made contiguous, then by the formula, forward and backward alike."""
    changes = {"bias": None, "mask": None, **PATTERNS[pattern]}
    lengths = torch.arange(48).reshape(MANY_DIMS) % 8 if changes.pop("lengths", False) else None
    inputs = draw(
        seed=1, dtype=dtype, device=device, batch=MANY_DIMS, heads=2, q=5, k=6, d=4, key_lengths=lengths, **changes
    )
    if permuted:
        order = [5, 0, 3, 1, 4, 2, 7, 6, 8]
        back = [order.index(i) for i in range(9)]
        swap = lambda x: x.permute(order).contiguous().permute(back) if x.dim() == 9 else x  # noqa: E731
        inputs = inputs.map(swap)
    judge = Judge()
    judge.compare(pattern, inputs)
    judge.verdict()


def test_permuted_cotangents_of_five_batch_dimensions(device):
    """The forward merged them, and the backward did not, whose cotangent lay otherwise in memory."""
    inputs = draw(seed=2, device=device, batch=(2, 2, 2, 2, 2), heads=2, q=3, k=4, d=4, bias=None, mask=None)
    expected = evaluate(gated_attention_with_lse, inputs)
    for order in ([4, 3, 2, 1, 0, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 1, 3, 7, 5, 6]):
        back = [order.index(i) for i in range(8)]
        cotangent = inputs.grad_out.permute(order).contiguous().permute(back)
        results = evaluate(gated_attention_with_lse, inputs.replace(grad_out=cotangent))
        for name, x in expected.items():
            assert torch.equal(x, results[name]), name


LENGTHS_ERRORS = {
    "window must be None without is_causal, but is 3": {"window": 3},
    "window must be at least 1, but is 0": {"is_causal": True, "window": 0},
    "window must be at least 1, but is -9223372036854775808": {"is_causal": True, "window": -(2**63)},
    "key_lengths must be int32 or int64, but is float32": {"key_lengths": torch.ones(2)},
    "key_lengths must be int32 or int64, but is int16": {"key_lengths": torch.ones(2, dtype=torch.int16)},
    "key_lengths must be int32 or int64, but is bool": {"key_lengths": torch.ones(2, dtype=torch.bool)},
    "key_lengths must have query's batch dimensions [2], but has shape [3]": {"key_lengths": torch.tensor([1, 2, 3])},
    "key_lengths must have query's batch dimensions [2], but has shape [1]": {"key_lengths": torch.tensor([1])},
    "key_lengths must have query's batch dimensions [2], but has shape []": {"key_lengths": torch.tensor(1)},
    "key_lengths must have query's batch dimensions [2], but has shape [2, 1]": {"key_lengths": torch.ones(2, 1).long()},
    "key_lengths must be on query's device cpu, but is on meta": {"key_lengths": torch.ones(2, device="meta").long()},
    "key_lengths must be a dense strided tensor, but has layout Sparse": {"key_lengths": torch.tensor([1, 2]).to_sparse()},
    "key_lengths must be a torch.Tensor or None, but is a list": {"key_lengths": [1, 2]},
}


@pytest.mark.parametrize("message", LENGTHS_ERRORS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors(message, requires_grad):
    inputs = draw(seed=1, mask=None)
    tensors = [x if x is None else x.requires_grad_(requires_grad) for x in inputs.tensors]
    # explain() takes layouts only, of any device.
    laid_out = "meta" not in message and "layout" not in message
    for function in (gated_attention, gated_attention_with_lse, *([explain] if laid_out else [])):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            function(*tensors, **LENGTHS_ERRORS[message])
        assert str(error.value).split("\n")[0] == message, function.__name__
    expected = (
        RuntimeError if "device" in message else TypeError if "int32" in message or "Tensor" in message else ValueError
    )
    assert isinstance(error.value, expected)


def test_errors_under_compile_and_on_meta():
    inputs = draw(seed=1, mask=None)
    meta = [x if x is None else x.to("meta") for x in inputs.tensors]
    with pytest.raises(ValueError, match="window must be None without is_causal, but is 3"):
        gated_attention(*meta, window=3)
    with pytest.raises(ValueError, match=r"key_lengths must have query's batch dimensions \[2\], but has shape \[3\]"):
        gated_attention(*meta, key_lengths=torch.ones(3, device="meta").long())
