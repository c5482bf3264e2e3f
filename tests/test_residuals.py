# SPDX-License-Identifier: BSD-3-Clause
"""A backward that is given out, row_max and row_sum of more keys than these, as ring attention has them: on every path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import Inputs, draw, evaluate
from oracle import gold
from torch import Tensor

from torch_gated_attn import gated_attention_with_lse

OPS = torch.ops.torch_gated_attn
MANY_DIMS = (2, 3, 2, 1, 2, 2)


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
