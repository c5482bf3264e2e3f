# SPDX-License-Identifier: BSD-3-Clause
"""An invalid call raises one sentence: the argument, what is expected, what came. The same on every path."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from inputs import draw

import torch_gated_attn
from torch_gated_attn import _C, GatedAttention, reference

B, H, Q, K, D, DV = 2, 4, 3, 5, 8, 6
PASS = ": pass mask > 0 for a mask of 0 and 1, bias=mask for an additive one (0 and -1e9)"


def arguments(**changes) -> dict[str, object]:
    inputs = draw(seed=1, batch=(B,), heads=H, kv_heads=2, q=Q, k=K, d=D, dv=DV)
    names = ("query", "key", "value", "gate", "bias", "mask")
    return {**dict(zip(names, inputs.tensors, strict=True)), **changes}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def nested(*tensors: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors warn that they are a prototype
        return torch.nested.nested_tensor(list(tensors))


# Changes to a valid call, the exception, and its whole message.
INVALID = {
    "query of rank 2": (
        {"query": zeros(Q, D)},
        ValueError,
        "query must have at least 3 dimensions [*, H, Q, D], but has shape [3, 8]",
    ),
    "query of integers": (
        {"query": zeros(B, H, Q, D, dtype=torch.int64)},
        TypeError,
        "query must be float32, float64, bfloat16 or float16, but is int64",
    ),
    "complex query": (
        {"query": zeros(B, H, Q, D, dtype=torch.complex64)},
        TypeError,
        "query must be float32, float64, bfloat16 or float16, but is complex64",
    ),
    "key of another rank": (
        {"key": zeros(2, K, D)},
        ValueError,
        "key must have as many dimensions as query of shape [2, 4, 3, 8], but has shape [2, 5, 8]",
    ),
    "value of another rank": (
        {"value": zeros(1, B, 2, K, DV)},
        ValueError,
        "value must have as many dimensions as query of shape [2, 4, 3, 8], but has shape [1, 2, 2, 5, 6]",
    ),
    "key of another batch": (
        {"key": zeros(1, 2, K, D)},
        ValueError,
        "key must have query's batch dimensions [2], but has shape [1, 2, 5, 8]",
    ),
    "value of another batch": (
        {"value": zeros(3, 2, K, DV)},
        ValueError,
        "value must have query's batch dimensions [2], but has shape [3, 2, 5, 6]",
    ),
    "key of another head_dim": (
        {"key": zeros(B, 2, K, D + 1)},
        ValueError,
        "key must have query's head_dim 8 as its last dimension, but has shape [2, 2, 5, 9]",
    ),
    "value of other heads": (
        {"value": zeros(B, 4, K, DV)},
        ValueError,
        "value must have as many heads as key, 2, but has shape [2, 4, 5, 6]",
    ),
    "value of another length": (
        {"value": zeros(B, 2, K + 1, DV)},
        ValueError,
        "value must have key's length 5, but has shape [2, 2, 6, 6]",
    ),
    "heads that do not divide": (
        {"key": zeros(B, 3, K, D), "value": zeros(B, 3, K, DV)},
        ValueError,
        "key must have a number of heads that divides query's 4, but has 3",
    ),
    "no key head": (
        {"key": zeros(B, 0, K, D), "value": zeros(B, 0, K, DV)},
        ValueError,
        "key must have a number of heads that divides query's 4, but has 0",
    ),
    "more key heads than query heads": (
        {"key": zeros(B, 8, K, D), "value": zeros(B, 8, K, DV)},
        ValueError,
        "key must have a number of heads that divides query's 4, but has 8",
    ),
    "key of another dtype": (
        {"key": zeros(B, 2, K, D, dtype=torch.float64)},
        TypeError,
        "key must have query's dtype float32, but is float64",
    ),
    "value of another dtype": (
        {"value": zeros(B, 2, K, DV, dtype=torch.bfloat16)},
        TypeError,
        "value must have query's dtype float32, but is bfloat16",
    ),
    "gate of another dtype": (
        {"gate": zeros(B, H, Q, DV, dtype=torch.float16)},
        TypeError,
        "gate must have query's dtype float32, but is float16",
    ),
    "bias of another dtype": (
        {"bias": zeros(B, H, Q, K, dtype=torch.float64)},
        TypeError,
        "bias must have float32 or query's dtype float32, but is float64",
    ),
    "mask of floats": (
        {"mask": zeros(B, 1, 1, K)},
        TypeError,
        "mask must be bool (True = attend), but is float32" + PASS,
    ),
    "additive mask": (
        {"mask": zeros(B, 1, 1, K, dtype=torch.bfloat16).fill_(-1e9)},
        TypeError,
        "mask must be bool (True = attend), but is bfloat16" + PASS,
    ),
    "mask of bytes": (
        {"mask": zeros(B, 1, 1, K, dtype=torch.uint8)},
        TypeError,
        "mask must be bool (True = attend), but is uint8" + PASS,
    ),
    "gate that does not broadcast": (
        {"gate": zeros(B, H, Q, DV + 1)},
        ValueError,
        "gate must be broadcastable to [*, H, Q, Dv] = [2, 4, 3, 6], but has shape [2, 4, 3, 7]",
    ),
    "gate that is larger": (
        {"gate": zeros(7, B, H, Q, DV)},
        ValueError,
        "gate must be broadcastable to [*, H, Q, Dv] = [2, 4, 3, 6], but has shape [7, 2, 4, 3, 6]",
    ),
    "bias that does not broadcast": (
        {"bias": zeros(H, K, Q)},
        ValueError,
        "bias must be broadcastable to [*, H, Q, K] = [2, 4, 3, 5], but has shape [4, 5, 3]",
    ),
    "bias of one dimension more, of size 1": (
        {"bias": zeros(1, B, H, Q, K)},
        ValueError,
        "bias must be broadcastable to [*, H, Q, K] = [2, 4, 3, 5], but has shape [1, 2, 4, 3, 5]",
    ),
    "mask that does not broadcast": (
        {"mask": zeros(B, K, dtype=torch.bool)},
        ValueError,
        "mask must be broadcastable to [*, H, Q, K] = [2, 4, 3, 5], but has shape [2, 5]",
    ),
    "unknown masked_rows": (
        {"masked_rows": "nan"},
        ValueError,
        'masked_rows must be "zero" or "mean", but is "nan"',
    ),
    "key on another device": (
        {"key": torch.zeros(B, 2, K, D, device="meta")},
        RuntimeError,
        "key must be on query's device cpu, but is on meta",
    ),
    "bias on another device": (
        {"bias": torch.zeros(B, H, Q, K, device="meta")},
        RuntimeError,
        "bias must be on query's device cpu, but is on meta",
    ),
    "gate on another device": (
        {"gate": torch.zeros(B, H, Q, DV, device="meta")},
        RuntimeError,
        "gate must be on query's device cpu, but is on meta",
    ),
    "mask on another device": (
        {"mask": torch.zeros(B, 1, 1, K, dtype=torch.bool, device="meta")},
        RuntimeError,
        "mask must be on query's device cpu, but is on meta",
    ),
    "sparse bias": (
        {"bias": zeros(B, H, Q, K).to_sparse()},
        ValueError,
        "bias must be a dense strided tensor, but has layout Sparse",
    ),
    "sparse mask": (
        {"mask": zeros(Q, K, dtype=torch.bool).to_sparse()},
        ValueError,
        "mask must be a dense strided tensor, but has layout Sparse",
    ),
    "sparse key": (
        {"key": zeros(B, 2, K, D).to_sparse()},
        ValueError,
        "key must be a dense strided tensor, but has layout Sparse",
    ),
    "nested query": (
        {"query": nested(zeros(H, Q, D), zeros(H, Q, D))},
        ValueError,
        "query must be a dense strided tensor, but is a nested tensor",
    ),
}


@pytest.mark.parametrize("function", [torch_gated_attn.gated_attention, torch_gated_attn.gated_attention_with_lse])
@pytest.mark.parametrize("name", INVALID)
def test_operator(function, name):
    changes, exception, message = INVALID[name]
    with pytest.raises(exception) as raised:
        function(**arguments(**changes))
    assert str(raised.value).split("\n")[0] == message


@pytest.mark.parametrize("name", [name for name in INVALID if not re.search("device|sparse|nested", name)])
def test_meta_tensors_are_checked_alike(name):
    changes, exception, message = INVALID[name]
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments(**changes).items()}
    with pytest.raises(exception) as raised:
        torch_gated_attn.gated_attention(**on_meta)
    assert str(raised.value).split("\n")[0] == message


@pytest.mark.parametrize("name", [name for name in INVALID if not re.search("device|sparse|nested", name)])
def test_arguments_that_require_grad_are_checked_alike(name):
    changes, exception, message = INVALID[name]
    leaves = {
        k: v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments(**changes).items()
    }
    with pytest.raises(exception) as raised:
        torch_gated_attn.gated_attention(**leaves)
    assert str(raised.value).split("\n")[0] == message


TOO_LARGE = {
    "key of 2^31 positions": (
        {"key": (1, 2**31, 1), "value": (1, 2**31, 1)},
        "key must have at most 2147479551 positions, but has shape [1, 2147483648, 1]",
    ),
    "head_dim of 2^31": (
        {"query": (1, 1, 2**31), "key": (1, 1, 2**31)},
        "query must have at most 2147479551 dimensions per head, but has shape [1, 1, 2147483648]",
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_sizes_beyond_32_bits(name):
    """Refused before anything is allocated for it."""
    shapes, message = TOO_LARGE[name]
    call = {argument: zeros(1, 1, 1).expand(shapes.get(argument, (1, 1, 1))) for argument in ("query", "key", "value")}
    with pytest.raises(ValueError, match="at most") as raised:
        torch_gated_attn.gated_attention(**call)
    assert str(raised.value).split("\n")[0] == message


@pytest.mark.skipif(_C.cuda_version is not None, reason="this build has CUDA kernels")
def test_cuda_without_cuda_kernels():
    forward = torch.ops.torch_gated_attn._gated_attention_forward.default
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    message = "query is on a CUDA device, but this build of torch_gated_attn has no CUDA kernels: rebuild it with "
    with pytest.raises(RuntimeError, match=re.escape(message)):
        forward.redispatch(cuda, *arguments().values(), None, "zero")


def test_incoming_gradient_of_another_shape():
    call = arguments()
    query = call["query"].requires_grad_()
    out = torch_gated_attn.gated_attention(**call)
    with pytest.raises(RuntimeError, match="shape"):
        torch.autograd.grad(out, query, torch.zeros(1, 2, 3))


def internal_backward(**changes):
    call = arguments()
    forward = torch.ops.torch_gated_attn._gated_attention_forward(*call.values(), None, "zero")
    out, lse, row_max, row_sum = forward
    names = ("grad_out", "grad_lse", *call, "out", "row_max", "row_sum")
    values = (torch.ones_like(out), torch.ones_like(lse), *call.values(), out, row_max, row_sum)
    tensors = {**dict(zip(names, values, strict=True)), **changes}
    return torch.ops.torch_gated_attn._gated_attention_backward(*tensors.values(), None, "zero", [True] * 5)


BACKWARD_INVALID = {
    "grad_out of another shape": (
        {"grad_out": zeros(B, H, Q, 1)},
        ValueError,
        "grad_out must have shape [*, H, Q, Dv] = [2, 4, 3, 6], but has shape [2, 4, 3, 1]",
    ),
    "grad_lse of another dtype": (
        {"grad_lse": zeros(B, H, Q, dtype=torch.float64)},
        TypeError,
        "grad_lse must have dtype float32, but is float64",
    ),
    "row_max of another shape": (
        {"row_max": zeros(B, H, Q, 1)},
        ValueError,
        "row_max must have shape [*, H, Q] = [2, 4, 3], but has shape [2, 4, 3, 1]",
    ),
    "row_sum missing a query": (
        {"row_sum": zeros(B, H, Q - 1)},
        ValueError,
        "row_sum must have shape [*, H, Q] = [2, 4, 3], but has shape [2, 4, 2]",
    ),
    "out of another dtype": (
        {"out": zeros(B, H, Q, DV, dtype=torch.float16)},
        TypeError,
        "out must have query's dtype float32, but is float16",
    ),
    "key of another head_dim": (
        {"key": zeros(B, 2, K, D + 1)},
        ValueError,
        "key must have query's head_dim 8 as its last dimension, but has shape [2, 2, 5, 9]",
    ),
}


@pytest.mark.parametrize("name", BACKWARD_INVALID)
def test_internal_backward_called_with_garbage(name):
    changes, exception, message = BACKWARD_INVALID[name]
    assert all(isinstance(grad, torch.Tensor) for grad in internal_backward())
    with pytest.raises(exception) as raised:
        internal_backward(**changes)
    assert str(raised.value).split("\n")[0] == message


def test_call_after_an_error_is_right():
    call = arguments()
    expected = torch_gated_attn.gated_attention(**call)
    for name in ("bias that does not broadcast", "unknown masked_rows"):
        with pytest.raises(ValueError, match="must be"):
            torch_gated_attn.gated_attention(**arguments(**INVALID[name][0]))
        assert torch.equal(torch_gated_attn.gated_attention(**call), expected)


def test_reference_checks_masked_rows():
    with pytest.raises(ValueError, match='masked_rows must be "zero" or "mean", but is "nan"'):
        reference.gated_attention(**arguments(masked_rows="nan"))


def module(**changes) -> GatedAttention:
    return GatedAttention(**{"q_dim": 8, "num_heads": 2, **changes})


MODULE_INVALID = {
    "no heads": (
        lambda: module(num_heads=0),
        ValueError,
        "num_heads must be at least 1, but is 0",
    ),
    "key_dim": (
        lambda: module(key_dim=5),
        ValueError,
        "key_dim must be divisible by num_heads 2, but is 5",
    ),
    "value_dim": (
        lambda: module(value_dim=7),
        ValueError,
        "value_dim must be divisible by num_heads 2, but is 7",
    ),
    "value_dim from kv_dim": (
        lambda: module(kv_dim=9),
        ValueError,
        "value_dim must be divisible by num_heads 2, but is 9",
    ),
    "masked_rows": (
        lambda: module(masked_rows="nan"),
        ValueError,
        'masked_rows must be "zero" or "mean", but is "nan"',
    ),
    "m_data missing": (
        lambda: module(kv_dim=6)(zeros(3, 8)),
        ValueError,
        "m_data must be given, as kv_dim 6 is not q_dim 8, but is None",
    ),
    "q_data of another width": (
        lambda: module()(zeros(3, 7)),
        ValueError,
        "q_data must have shape [*, Q, 8], but has shape [3, 7]",
    ),
    "q_data of rank 1": (
        lambda: module()(zeros(8)),
        ValueError,
        "q_data must have shape [*, Q, 8], but has shape [8]",
    ),
    "m_data of another width": (
        lambda: module(kv_dim=6)(zeros(3, 8), zeros(3, 8)),
        ValueError,
        "m_data must have shape [*, K, 6], but has shape [3, 8]",
    ),
    "mask of floats": (
        lambda: module()(zeros(3, 8), mask=zeros(3, 3)),
        TypeError,
        "mask must be bool (True = attend), but is float32" + PASS,
    ),
    "mask of rank 1": (
        lambda: module()(zeros(3, 8), mask=zeros(3, dtype=torch.bool)),
        ValueError,
        "mask must have q_data's rank 2, as [*, Q, K], or one more, as [*, H or 1, Q, K], but has shape [3]",
    ),
    "mask of two ranks more": (
        lambda: module()(zeros(3, 8), mask=zeros(1, 1, 3, 3, dtype=torch.bool)),
        ValueError,
        "mask must have q_data's rank 2, as [*, Q, K], or one more, as [*, H or 1, Q, K], but has shape [1, 1, 3, 3]",
    ),
    "parameters missing": (
        lambda: GatedAttention.from_alphafold({"query_w": zeros(8, 2, 4)}),
        ValueError,
        "params must have the keys key_w, output_b, output_w, query_w, value_w, but has query_w",
    ),
    "parameters that do not fit": (
        lambda: GatedAttention.from_alphafold(alphafold(key_w=zeros(8, 2, 5))),
        ValueError,
        "key_w must have shape [8, 2, 4] to fit the other arrays, but has shape [8, 2, 5]",
    ),
    "a parameter of another rank": (
        lambda: GatedAttention.from_alphafold(alphafold(query_w=zeros(8, 8))),
        ValueError,
        "query_w must have 3 dimensions, but has shape [8, 8]",
    ),
}


def alphafold(**changes) -> dict[str, torch.Tensor]:
    params = {
        "query_w": zeros(8, 2, 4),
        "key_w": zeros(8, 2, 4),
        "value_w": zeros(8, 2, 4),
        "output_w": zeros(2, 4, 8),
        "output_b": zeros(8),
    }
    return {**params, **changes}


@pytest.mark.parametrize("name", MODULE_INVALID)
def test_module(name):
    call, exception, message = MODULE_INVALID[name]
    with pytest.raises(exception) as raised:
        call()
    assert str(raised.value) == message
