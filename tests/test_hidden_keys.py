# SPDX-License-Identifier: BSD-3-Clause
"""What no query of a batch entry sees by its position may hold anything, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, Inputs, assert_identical, draw, evaluate

from torch_gated_attn import gated_attention_with_lse, reference

HIDDEN = {
    "lengths": {"key_lengths": [7, 0]},
    "lengths and causal": {"key_lengths": [7, 3], "is_causal": True},
    "keys before every window": {"is_causal": True, "window": 4, "q": 5},
    "few queries": {"key_lengths": [7, 0], "q": 1},
    "few queries, window": {"is_causal": True, "window": 4, "q": 1},
    "many keys": {"key_lengths": [7, 0], "q": 1, "k": 1100, "d": 64},
    "beside a mask": {"key_lengths": [7, 3], "mask": "full"},
    "beside a mask of keys": {"key_lengths": [7, 3], "mask": "key"},
    "grouped heads": {"key_lengths": [7, 3], "heads": 4, "kv_heads": 2, "q": 40, "k": 70},
}


def with_garbage(inputs: Inputs) -> Inputs:
    """NaN, infinities and large numbers in the keys and values that no query of a batch entry sees."""
    q, k = inputs.query.size(-2), inputs.key.size(-2)
    seen = reference._visible(q, k, *inputs.visibility, inputs.query.device)
    hidden = ~seen.expand(*inputs.query.shape[:-3], 1, q, k).any(-2).transpose(-1, -2).unsqueeze(-3).squeeze(-3).unsqueeze(
        -1
    )
    hidden = hidden.reshape(*inputs.key.shape[:-3], 1, k, 1)
    assert hidden.any()
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(inputs.query.dtype).max])
    fill = garbage.repeat(k)[:k, None].to(inputs.query)
    return inputs.replace(key=torch.where(hidden, fill, inputs.key), value=torch.where(hidden, fill.flip(0), inputs.value))


@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_keys_leave_no_trace(device, dtype, case):
    """Not in a bit of any result or gradient, by the kernels and by the formula of torch.func."""
    inputs = draw(**{"seed": 2, "dtype": dtype, "device": device, "mask": None, **HIDDEN[case]})
    garbage = with_garbage(inputs)
    expected = evaluate(gated_attention_with_lse, inputs)
    assert_identical(expected, evaluate(gated_attention_with_lse, garbage), case)
    assert all(x.isfinite().all() for name, x in expected.items() if name != "lse")

    def by_formula(call: Inputs) -> dict[str, torch.Tensor]:
        leaves = call.tensors[:5]
        results, pullback = torch.func.vjp(lambda *a: gated_attention_with_lse(*a, call.mask, **call.options), *leaves)
        grads = pullback((call.grad_out, call.grad_lse))
        return {str(i): x for i, x in enumerate((*results, *grads))}

    assert_identical(by_formula(inputs), by_formula(garbage), f"{case}, formula")
