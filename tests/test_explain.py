# SPDX-License-Identifier: BSD-3-Clause
"""explain() names the kernel that a call takes, and why, without running it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from inputs import draw

from torch_gated_attn import _C, explain

BF16 = torch.bfloat16
SHARED_BIAS = {"batch": (4,), "heads": 2, "q": 16, "k": 24, "d": 16, "dtype": BF16, "bias": (1, 2, 16, 24)}


def explained(changes=(), grad=(), device="sm_90", meta=False, **more):
    inputs = draw(**{"seed": 1, **SHARED_BIAS, **dict(changes)})
    tensors = [t if t is None or not meta else t.to("meta") for t in inputs.tensors]
    return explain(*tensors, **inputs.options, grad=grad, device=device, **more)


ON_SM_90 = [
    ({}, (), "tensor-core", "the tensor-core kernel that shares the bias between batch rows"),
    ({"batch": (1,)}, (), "tensor-core", "a bias per batch row"),
    ({"batch": (5,)}, (), "tensor-core", "a bias per batch row"),  # a second group of four would be mostly empty
    ({"batch": (5,), "d": 32}, (), "tensor-core", "shares the bias between batch rows"),  # groups of three
    ({"bias": "full"}, (), "tensor-core", "a bias per batch row"),
    ({"bias": None}, (), "tensor-core", "without bias"),
    ({"bias_dtype": torch.float32}, (), "tensor-core", "shares the bias"),
    ({"d": 12}, (), "general tensor-core", "head_dim is not a multiple of 8"),
    ({"mask": "full"}, (), "tensor-core", "shares the bias"),
    ({"is_causal": True, "window": 3}, ("bias",), "tensor-core", "shares the bias"),
    ({"key_lengths": (3, 24, 0, 7), "mask": "full"}, (), "tensor-core", "shares the bias"),
    ({"scale": 0.0}, (), "general tensor-core", "the scale is zero or out of the range"),
    ({"scale": 3.0}, (), "general tensor-core", "the scale is too large to carry the bias"),
    ({"k": 23, "bias": (1, 2, 16, 23)}, (), "tensor-core", "on a copy of the bias whose rows are aligned"),
    ({"bias": (1, 2, 1, 24)}, (), "tensor-core", "shares the bias"),
    ({"bias": (1, 2, 1, 24)}, ("query",), "general tensor-core", "the bias is the same for all queries"),
    ({}, ("query", "bias"), "tensor-core", "shares the bias"),
    ({"dtype": torch.float32}, (), "tensor-core", "the float32 tensor-core kernel (three TF32 products) with bias"),
    ({"dtype": torch.float32, "bias": (1, 2, 1, 24)}, ("query",), "tensor-core", "three TF32 products"),
    ({"dtype": torch.float32, "d": 18}, (), "plain", "float32 multiply-adds: head_dim is not a multiple of 4"),
    ({"dtype": torch.float64}, ("key",), "plain", "float64 takes the plain kernel"),
    ({"d": 136}, (), "composite", "head_dim 136 is outside 1..128, the range of the fused kernels: the composite formula"),
    ({"d": 16, "dv": 200}, ("value",), "composite", "head_dim 200 is outside 1..128"),
]


@pytest.mark.parametrize(("changes", "grad", "kernel", "reason"), ON_SM_90, ids=lambda x: str(x)[:48])
def test_choice_on_a_gpu(changes, grad, kernel, reason):
    answer = explained(changes, grad)
    assert answer.kernel == kernel
    assert reason in answer.reason
    assert answer.device == "sm_90"


def test_layout_and_alignment_count():
    inputs = draw(seed=1, **SHARED_BIAS)
    assert explain(*inputs.tensors, device="sm_90").kernel == "tensor-core"
    shifted = torch.empty(inputs.query.numel() + 1, dtype=BF16)[1:].view_as(inputs.query)
    answer = explain(shifted, *inputs.tensors[1:], device="sm_90")
    assert answer.kernel == "general tensor-core"
    assert "not aligned to 16 bytes" in answer.reason
    # Rows that are not contiguous are copied by the launcher: the copy is aligned.
    turned = inputs.query.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert explain(turned, *inputs.tensors[1:], device="sm_90").kernel == "tensor-core"


def test_tensors_without_values():
    assert explained(meta=True) == explained()
    with pytest.raises(ValueError, match=r'^device must be given \("cpu", or like "sm_90"\) for tensors on meta$'):
        explained(meta=True, device=None)


@pytest.mark.parametrize(("asked", "arch"), [("sm_75", "7.5"), ("sm_60", "6.0")])
def test_old_architecture(asked, arch):
    answer = explained(device=asked)
    assert answer.kernel == "composite"
    assert f"compute capability {arch} is below 8.0" in answer.reason


@pytest.mark.skipif(_C.cuda_version is not None, reason="this build has CUDA kernels")
def test_build_without_cuda_kernels():
    assert explained().reason.endswith("; this library was built without CUDA kernels")


def test_details_of_a_gpu_kernel():
    assert explained({"d": 40, "dtype": torch.float16}).details == {"compiled_head_dim": "48", "bias": "16-bit fragments"}
    assert explained({"d": 12}).details["bias"] == "one element at a time"
    assert explained({"d": 136}).details == {}


@pytest.mark.parametrize(
    ("changes", "grad", "kernel", "reason"),
    [
        ({}, (), "query per lane", "more queries share a key head than the path for few takes"),
        ({"q": 4, "bias": (1, 2, 4, 24)}, (), "few queries", "at most 4 queries share a key head"),
        ({"q": 5, "bias": (1, 2, 5, 24)}, (), "query per lane", "more queries share a key head"),
        (
            {"q": 3, "bias": (1, 2, 3, 24), "kv_heads": 1},
            (),
            "query per lane",
            "more queries share a key head",
        ),  # 6 with both heads
        ({"q": 4, "bias": (1, 2, 4, 24)}, ("query",), "few queries", "at most 4 queries"),
        ({"q": 4, "bias": (1, 2, 4, 24)}, ("bias",), "few queries", "at most 4 queries"),
    ],
    ids=lambda x: str(x)[:48],
)
def test_choice_on_the_cpu(changes, grad, kernel, reason):
    answer = explained(changes, grad, device=None)
    assert (answer.kernel, answer.device) == (kernel, "cpu")
    assert reason in answer.reason
    assert answer.details == {"instruction_set": _C.cpu_capability()}


@pytest.mark.parametrize("changes", [{"q": 0, "bias": None}, {"batch": (0,)}, {"k": 0, "bias": None}])
@pytest.mark.parametrize("asked", [None, "sm_90"])
def test_nothing_to_compute(changes, asked):
    assert explained(changes, device=asked).kernel == "none"


def test_errors_are_those_of_the_call():
    inputs = draw(seed=1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r'^masked_rows must be "zero" or "mean", but is "skip"$'):
        explain(*inputs.tensors, masked_rows="skip")
    with pytest.raises(TypeError, match="key must have query's dtype"):
        explain(inputs.query, inputs.key.double(), *inputs.tensors[2:])
    with pytest.raises(ValueError, match=r"^grad must name arguments .* \(query, key, value\), but names 'bias'$"):
        explain(*inputs.tensors[:3], grad=["bias"])
    with pytest.raises(ValueError, match=r'^device must be "cpu" or like "sm_90", but is \'cuda\'$'):
        explain(*inputs.tensors, device="cuda")


def test_answers_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        explained().kernel = "another"


def test_calls_of_pytorchs_attention():
    """Decided in the same place as the call's own: route.cpp."""
    query, wide = torch.randn(2, 4, 6, 16), torch.empty(2, 4, 6, 256, dtype=BF16, device="meta")
    for options in ({}, {"window": 3}, {"key_lengths": torch.tensor([6, 2])}):
        assert explain(query, query, query, is_causal=True, **options).kernel == "query per lane"
        assert explain(wide, wide, wide, is_causal=True, device="sm_90").kernel == "sdpa"
    assert explain(query, query, query, is_causal=True, device="sm_90").kernel != "sdpa"
    assert explain(wide, wide, wide, device="sm_90").reason == "head_dim is above 128, the widest fused CUDA kernel"
    assert explain(wide, wide, wide, device="cpu").kernel == "few queries"
    with pytest.raises(ValueError, match="window must be None without is_causal, but is 3"):
        explain(query, query, query, window=3)
