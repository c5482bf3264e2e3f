# SPDX-License-Identifier: BSD-3-Clause
"""What once went wrong in causal calls and in backwards with residuals from outside; each case is one that failed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import Inputs, draw, evaluate
from oracle import gold
from tolerance import Judge
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torch_gated_attn import explain, gated_attention, gated_attention_with_lse

OPS = torch.ops.torch_gated_attn
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
    "value of other heads": ({"value": (1, 2, 40, 64)}, "value must have as many heads as key, 4, but has shape [1, 2, 40, 64]"),
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


def merged(shards: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """out and lse of all keys from those of each shard's, in float64, as ring attention has them."""
    lse = torch.stack([lse for _, lse in shards]).logsumexp(0)
    return sum(out * (part - lse).exp()[..., None] for out, part in shards), lse  # type: ignore[return-value]


Backward = Callable[..., tuple[Tensor | None, ...]]


def recorded(*arguments: object) -> tuple[Tensor | None, ...]:
    """As in a backward that is itself recorded."""
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    return tuple(None if g is None else g.detach() for g in OPS._gated_attention_backward(*leaves))


def functorch(*arguments: object) -> tuple[Tensor | None, ...]:
    def of_query(query: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        grads = OPS._gated_attention_backward(arguments[0], arguments[1], query, *arguments[3:])
        return grads[0].sum(), tuple(x for x in grads if x is not None)

    _, grads = torch.func.grad(of_query, has_aux=True)(arguments[2])
    rest = iter(grads)
    return tuple(next(rest) if wanted else None for wanted in arguments[13])  # type: ignore[attr-defined]


def mapped(*arguments: object) -> tuple[Tensor | None, ...]:
    lead = lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x  # noqa: E731
    in_dims = tuple(0 if isinstance(x, Tensor) else None for x in arguments)
    wanted = arguments[13]

    def call(*inner: object) -> tuple[Tensor, ...]:
        return tuple(g for g in OPS._gated_attention_backward(*inner) if g is not None)

    rest = iter(torch.vmap(call, in_dims)(*(lead(x) for x in arguments)))
    return tuple(next(rest)[0] if w else None for w in wanted)  # type: ignore[attr-defined]


PATHS: dict[str, Backward] = {
    "fused": OPS._gated_attention_backward,
    "recorded": recorded,
    "functorch": functorch,
    "vmap": mapped,
}
SHARDS = {
    "few queries": {"q": 2, "d": 4},
    "query per lane": {"q": 9, "d": 8},
    "in parts": {"q": 300, "d": 8, "batch": (), "heads": 1},
    "batch dimensions that do not merge": {
        "batch": MANY_DIMS,
        "q": 3,
        "d": 4,
        "gate": (2, 1, 2, 1, 1, 2, 1, 3, 4),
        "bias": (2, 1, 2, 1, 2, 1, 2, 3, 40),
    },
}


def shard(inputs: Inputs, begin: int, end: int) -> Inputs:
    cut = lambda x, d: None if x is None else x.narrow(d, begin, end - begin)  # noqa: E731
    return inputs.replace(
        key=cut(inputs.key, -2), value=cut(inputs.value, -2), bias=cut(inputs.bias, -1), mask=cut(inputs.mask, -1)
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", SHARDS)
def test_residuals_of_more_keys_than_these(device, case, path):
    """out, row_max and row_sum merged over shards: the gradients are those of the formula over all keys, in float64.

    The shard in the middle has no attended key of one row, the last one has no keys at all.
    """
    changes = {"bias": (2, 300, 40) if case == "in parts" else "full", **SHARDS[case]}
    changes["bias"] = (1, 300, 40) if case == "in parts" else changes["bias"]
    inputs = draw(seed=3, dtype=torch.float64, device=device, k=40, mask=(SHARDS[case]["q"], 40), **changes)
    inputs.mask[1, 10:30] = False
    expected = gold(inputs)
    bounds = [(0, 10), (10, 30), (30, 40), (40, 40)]
    parts = [shard(inputs, *b) for b in bounds]
    gateless = [evaluate(gated_attention_with_lse, p.replace(gate=None), ()) for p in parts]
    out, lse = merged([(x["out"], x["lse"]) for x in gateless])
    out = out * inputs.gate.sigmoid()
    # The residuals of the kernels: a shift in units of log2, here the lse itself, and the sum that is left, 1.
    row_max, row_sum = lse / torch.log(torch.tensor(2.0, dtype=torch.float64)), torch.ones_like(lse)
    results = []
    for part in parts:
        flat = (inputs.grad_out, inputs.grad_lse, *part.tensors, out, row_max, row_sum)
        results.append(PATHS[path](*flat, None, "zero", [True] * 5))
    joined = {
        "d_query": sum(g[0] for g in results),
        "d_key": torch.cat([g[1] for g in results], -2),
        "d_value": torch.cat([g[2] for g in results], -2),
        "d_bias": torch.cat([g[4] for g in results], -1),
    }
    for name, x in joined.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    for grads in results:  # from out, which every shard has: also the one without keys
        torch.testing.assert_close(grads[3], expected["d_gate"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_residuals_with_causal_order_and_lengths(device, path):
    """Shards of a causal call: the last block of keys against all queries, the rest with no order among them."""
    inputs = draw(seed=4, dtype=torch.float64, device=device, q=20, k=20, bias=None, mask=None, is_causal=True)
    inputs = inputs.replace(key_lengths=torch.tensor([20, 17], device=device))
    expected = gold(inputs)
    whole = evaluate(gated_attention_with_lse, inputs, ())
    row_max, row_sum = whole["lse"] / torch.log(torch.tensor(2.0, dtype=torch.float64)), torch.ones_like(whole["lse"])
    out = whole["out"]
    # Queries 10.. against keys 0..9, all of them visible, and against keys 10.., which end where the queries do.
    late = lambda x, d: x.narrow(d, 10, 10)  # noqa: E731
    rows = [late(inputs.grad_out, -2), late(inputs.grad_lse, -1), late(inputs.query, -2)]
    kept = [late(inputs.gate, -2), None, None, late(out, -2), late(row_max, -1), late(row_sum, -1), None, "zero"]
    first = [inputs.key[..., :10, :], inputs.value[..., :10, :]]
    second = [inputs.key[..., 10:, :], inputs.value[..., 10:, :]]
    wanted = [True, True, True, True, False]
    a = PATHS[path](*rows, *first, *kept, wanted)
    b = PATHS[path](*rows, *second, *kept, wanted, True, None, inputs.key_lengths - 10)
    torch.testing.assert_close(a[0] + b[0], late(expected["d_query"], -2), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(b[1], expected["d_key"][..., 10:, :], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(b[2], expected["d_value"][..., 10:, :], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(b[3], late(expected["d_gate"], -2), rtol=1e-9, atol=1e-10)


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
    expected = RuntimeError if "device" in message else TypeError if "int32" in message or "Tensor" in message else ValueError
    assert isinstance(error.value, expected)


def test_errors_under_compile_and_on_meta():
    inputs = draw(seed=1, mask=None)
    meta = [x if x is None else x.to("meta") for x in inputs.tensors]
    with pytest.raises(ValueError, match="window must be None without is_causal, but is 3"):
        gated_attention(*meta, window=3)
    with pytest.raises(ValueError, match=r"key_lengths must have query's batch dimensions \[2\], but has shape \[3\]"):
        gated_attention(*meta, key_lengths=torch.ones(3, device="meta").long())
