# SPDX-License-Identifier: BSD-3-Clause
"""Any strides in, query's memory order out; inputs are only read and results are new memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from inputs import DIFFERENTIABLE, DTYPES, Inputs, assert_identical, draw, evaluate
from tolerance import Judge
from torch import Tensor

from torch_gated_attn import gated_attention, gated_attention_with_lse

BATCH, HEADS, Q, K, D, DV = 3, 2, 14, 23, 8, 12
FLOATING = (*DIFFERENTIABLE, "grad_out", "grad_lse")


def make(seed: int = 0, **changes) -> Inputs:
    shape = {"batch": (BATCH,), "heads": HEADS, "q": Q, "k": K, "d": D, "dv": DV, "mask": "full"}
    return draw(**{"seed": seed, **shape, **changes})


def permuted(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values, with the dimensions in memory in the order `order`, outermost first."""
    return x.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def gapped(x: Tensor) -> Tensor:
    """The same values, every second element of every row of a larger buffer filled with NaN."""
    buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan).to(x)
    view = buffer[..., 1 : 1 + 2 * x.shape[-1] : 2]
    return view.copy_(x)


def offset(x: Tensor, by: int) -> Tensor:
    """The same values, starting `by` elements into their storage."""
    buffer = torch.full((x.numel() + by + 3,), torch.nan).to(x)
    return buffer[by : by + x.numel()].view(x.shape).copy_(x)


def same_results(inputs: Inputs, changed: Inputs, label: object) -> None:
    """Layout changes no bit."""
    results = (evaluate(gated_attention_with_lse, call) for call in (inputs, changed))
    assert_identical(*results, label)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["query", "key", "value", "gate", "bias", "grad_out"])
def test_every_order_of_dimensions(device, dtype, name):
    inputs = make(dtype=dtype, device=device)
    for order in itertools.permutations(range(4)):
        same_results(inputs, inputs.replace(**{name: permuted(getattr(inputs, name), order)}), f"{name} {order}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_with_gaps_and_storage_offsets(device, dtype):
    inputs = make(dtype=dtype, device=device)
    same_results(inputs, inputs.map(gapped), "gaps in everything")
    for name in FLOATING:
        same_results(inputs, inputs.replace(**{name: gapped(getattr(inputs, name))}), f"gaps in {name}")
    for by in range(1, 8):
        same_results(inputs, inputs.map(lambda x, by=by: offset(x, by)), f"offset {by}")


def test_masks_of_every_layout(device):
    inputs = make(device=device)
    for order in itertools.permutations(range(4)):
        same_results(inputs, inputs.replace(mask=permuted(inputs.mask, order)), f"mask {order}")
    wide = torch.zeros(*inputs.mask.shape[:-1], 2 * K, dtype=torch.bool, device=device)
    wide[..., ::2] = inputs.mask
    same_results(inputs, inputs.replace(mask=wide[..., ::2]), "every second mask element")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_larger_than_the_tensor(device, dtype):
    """Every dimension sits in a buffer with room to spare."""
    inputs = make(dtype=dtype, device=device)

    def spread(x: Tensor) -> Tensor:
        buffer = torch.full([size + 2 for size in x.shape], torch.nan).to(x)
        return buffer[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)

    same_results(inputs, inputs.map(spread), "room around every dimension")


def test_strides_of_dimensions_of_size_1(device):
    """The stride of a dimension of size 1 is never used, whatever it is."""
    inputs = draw(seed=3, device=device, batch=(1,), heads=1, q=1, k=K, d=D)

    def absurd(x: Tensor) -> Tensor:
        return x.as_strided(x.shape, [10**12 + 7 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])

    same_results(inputs, inputs.map(absurd), "absurd strides")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_projections(device, dtype):
    """query, key, value and gate as slices of one [B, L, 4, H, D] projection; results come back as [B, L, H, D]."""
    generator = torch.Generator().manual_seed(5)
    packed = torch.randn(BATCH, K, 4, HEADS, D, generator=generator).to(device, dtype)
    query, key, value, gate = packed.permute(2, 0, 3, 1, 4)
    drawn = draw(seed=6, dtype=dtype, device=device, batch=(BATCH,), heads=HEADS, q=K, k=K, d=D)
    inputs = drawn.replace(query=query, key=key, value=value, gate=gate)
    judge = Judge()
    judge.compare("packed", inputs)
    judge.verdict()
    same_results(inputs.map(Tensor.contiguous), inputs, "packed")
    out = gated_attention(*inputs.tensors)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", FLOATING)
def test_expanded_inputs(device, name):
    """An input with strides of 0, over each dimension in turn and over several, from rows that are dense or have gaps."""
    inputs = make(device=device)
    x = getattr(inputs, name)
    judge = Judge()
    for count in range(1, x.dim() + 1):
        for dims in itertools.combinations(range(x.dim()), count):
            small = x[tuple(slice(0, 1) if d in dims else slice(None) for d in range(x.dim()))]
            for how in (Tensor.contiguous, gapped):
                expanded = how(small).expand_as(x)
                judge.compare(f"{name} {how.__name__} expanded over {dims}", inputs.replace(**{name: expanded}))
    judge.verdict()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_scalar_gradient(device, dtype):
    """out.sum() sends one expanded number back."""
    inputs = make(dtype=dtype, device=device, lse=False)
    one = torch.ones((), dtype=dtype, device=device)
    expanded = inputs.replace(grad_out=one.expand_as(inputs.grad_out))
    assert set(expanded.grad_out.stride()) == {0}
    judge = Judge()
    judge.compare("grad_out of 1", expanded)
    judge.verdict()
    same_results(expanded, expanded.replace(grad_out=torch.ones_like(inputs.grad_out)), "grad_out of 1")

    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    gated_attention(*leaves, inputs.mask).sum().backward()
    for name, leaf in zip(DIFFERENTIABLE, leaves, strict=True):
        assert torch.equal(leaf.grad, evaluate(gated_attention_with_lse, expanded)[f"d_{name}"]), name


def test_gradients_of_slices(device):
    """Only every second query and value column is used: the incoming gradient is scattered, partly zero."""
    inputs = make(device=device, lse=False)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    out = gated_attention(*leaves, inputs.mask)
    (out[:, :, ::2, ::3] * inputs.grad_out[:, :, ::2, ::3]).sum().backward()
    used = torch.zeros_like(inputs.grad_out)
    used[:, :, ::2, ::3] = inputs.grad_out[:, :, ::2, ::3]
    expected = evaluate(gated_attention_with_lse, inputs.replace(grad_out=used))
    for name, leaf in zip(DIFFERENTIABLE, leaves, strict=True):
        assert torch.equal(leaf.grad, expected[f"d_{name}"]), name


def memory_order(x: Tensor) -> list[int]:
    """Dimensions of more than one element, from the largest stride to the smallest; ties keep their order."""
    return sorted((d for d in range(x.dim()) if x.size(d) > 1), key=lambda d: -x.stride(d))


@pytest.mark.parametrize("batch", [(), (BATCH,), (2, BATCH)])
def test_output_follows_query_in_memory(device, batch):
    inputs = draw(seed=7, device=device, batch=batch, heads=HEADS, q=Q, k=K, d=D, dv=DV)
    for order in itertools.permutations(range(inputs.query.dim())):
        query = permuted(inputs.query, order)
        out, lse = gated_attention_with_lse(*inputs.replace(query=query).tensors)
        assert memory_order(out) == list(order) == memory_order(query)
        assert torch.empty_like(out, memory_format=torch.preserve_format).stride() == out.stride(), "not dense"
        assert out.permute(order).is_contiguous()
        assert lse.is_contiguous()
    # A slice has query's order, not its gaps.
    sliced = inputs.query.repeat_interleave(2, dim=-1)[..., ::2]
    assert gated_attention(*inputs.replace(query=sliced).tensors).is_contiguous()
    # An expanded query has no order of its own.
    expanded = inputs.query[..., :1, :].expand_as(inputs.query)
    assert gated_attention(*inputs.replace(query=expanded).tensors).is_contiguous()


def test_inputs_are_not_written_and_results_are_new_memory(device):
    inputs = make(device=device)
    tensors = {name: getattr(inputs, name) for name in (*FLOATING, "mask")}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    results = evaluate(gated_attention_with_lse, inputs)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} was written"
        assert tensor._version == versions[name]
    storages = [x.untyped_storage().data_ptr() for x in (*tensors.values(), *results.values())]
    assert len(set(storages)) == len(storages), "a result shares memory with an input or with another result"


def test_one_tensor_as_query_key_and_value(device):
    inputs = draw(seed=8, device=device, batch=(BATCH,), heads=HEADS, q=Q, k=Q, d=D)
    shared = inputs.query.detach().requires_grad_()
    gated_attention(shared, shared, shared, None, inputs.bias, inputs.mask).backward(inputs.grad_out)
    separate = inputs.replace(key=inputs.query, value=inputs.query, gate=None, grad_lse=None)
    results = evaluate(gated_attention_with_lse, separate)
    total = results["d_query"] + results["d_key"] + results["d_value"]
    torch.testing.assert_close(shared.grad, total, rtol=1e-5, atol=1e-6)


def test_overlapping_views(device):
    """Windows over one sequence that overlap: read-only inputs may share memory with themselves."""
    buffer = torch.randn(BATCH, HEADS, Q + 2 * K, generator=torch.Generator().manual_seed(9)).to(device)
    windows = buffer.unfold(-1, D, 1)
    inputs = draw(seed=10, device=device, batch=(BATCH,), heads=HEADS, q=Q, k=K, d=D)
    inputs = inputs.replace(query=windows[:, :, :Q], key=windows[:, :, 3 : 3 + K], value=windows[:, :, 5 : 5 + K])
    judge = Judge()
    judge.compare("windows", inputs)
    judge.verdict()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_a_result_is_written(device, dtype):
    """New memory is filled with NaN first, so that an element left out shows."""
    inputs = make(dtype=dtype, device=device)
    plain = evaluate(gated_attention_with_lse, inputs)
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        poisoned = evaluate(gated_attention_with_lse, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert_identical(plain, poisoned, "memory filled with NaN")
