# SPDX-License-Identifier: BSD-3-Clause
"""The module is AlphaFold 2's `Attention`: formula, initialisation, parameters, and what a module has to survive."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from inputs import POLICIES, draw_mask
from torch import Tensor

from torch_gated_attn import GatedAttention

CASES = {
    "self-attention": {},
    "without gating": {"gating": False},
    "cross-attention": {"kv_dim": 12},
    "widths that differ": {"kv_dim": 10, "key_dim": 12, "value_dim": 20, "output_dim": 7},
    "every bias": {"q_bias": True},
    "no bias": {"gate_bias": False, "output_bias": False},
    "one head": {"num_heads": 1},
    "zero": {"masked_rows": "zero"},
}
Q_DIM, Q, K, BATCH = 16, 6, 9, (2, 3)


def alphafold_attention(params: dict[str, Tensor], q_data, m_data, mask, bias, gating: bool, masked_rows: str) -> Tensor:
    """The formula of AlphaFold 2's Attention, from the supplement, over weights of shape [A, H, D]."""
    query = torch.einsum("...qa,ahd->...qhd", q_data, params["query_w"]) * params["query_w"].shape[-1] ** -0.5
    if "query_b" in params:
        query = query + params["query_b"] * params["query_w"].shape[-1] ** -0.5
    key = torch.einsum("...ka,ahd->...khd", m_data, params["key_w"])
    value = torch.einsum("...ka,ahd->...khd", m_data, params["value_w"])
    logits = torch.einsum("...qhd,...khd->...hqk", query, key)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        # The additive -1e9 of AlphaFold absorbs a logit in float32, not in float64.
        logits = torch.where(mask, logits, torch.full_like(logits, -1e9) if masked_rows == "mean" else -torch.inf)
        dead = ~mask.expand_as(logits).any(-1, keepdim=True)
        logits = logits.masked_fill(dead, 0.0)
    weights = logits.softmax(-1)
    if mask is not None and masked_rows == "zero":
        weights = weights.masked_fill(dead, 0.0)
    average = torch.einsum("...hqk,...khd->...qhd", weights, value)
    if gating:
        gate = torch.einsum("...qa,ahd->...qhd", q_data, params["gating_w"])
        average = average * torch.sigmoid(gate + params.get("gating_b", 0.0))
    return torch.einsum("...qhd,hdo->...qo", average, params["output_w"]) + params.get("output_b", 0.0)


def alphafold_parameters(module: GatedAttention) -> dict[str, Tensor]:
    """The module's parameters in AlphaFold's shapes, differentiable views of them."""
    heads = module.num_heads
    params = {}
    for name, layer in (("query", "linear_q"), ("key", "linear_k"), ("value", "linear_v"), ("gating", "linear_g")):
        linear = getattr(module, layer)
        if linear is not None:
            params[f"{name}_w"] = linear.weight.T.unflatten(1, (heads, -1))
            if linear.bias is not None:
                params[f"{name}_b"] = linear.bias.unflatten(0, (heads, -1))
    params["output_w"] = module.linear_o.weight.T.unflatten(0, (heads, -1))
    if module.linear_o.bias is not None:
        params["output_b"] = module.linear_o.bias
    return params


def make(dtype: torch.dtype = torch.float64, device: str = "cpu", **changes) -> GatedAttention:
    """A module whose every parameter is random, also those that start at 0 or 1."""
    module = GatedAttention(**{"q_dim": Q_DIM, "num_heads": 4, "device": device, "dtype": dtype, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def data(module: GatedAttention, device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    q_data, m_data = normal(*BATCH, Q, module.q_dim), normal(*BATCH, K, module.kv_dim)
    mask = draw_mask((*BATCH, 1, 1, K), generator)
    mask[1, 2] = False
    return q_data, m_data, mask.to(device), normal(BATCH[0], 1, module.num_heads, Q, K)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked_rows", POLICIES)
def test_equals_alphafolds_formula_with_all_gradients(device, case, masked_rows):
    module = make(device=device, **{"masked_rows": masked_rows, **CASES[case]})
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in data(module, device)]
    params = alphafold_parameters(module)
    result = module(*inputs)
    expected = alphafold_attention(params, *inputs, module.gating, module.masked_rows)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    wanted = [*module.parameters(), *(x for x in inputs if x.requires_grad)]
    grads = torch.autograd.grad(result, wanted, cotangent)
    expected_grads = torch.autograd.grad(expected, wanted, cotangent)
    for i, (grad, expected_grad) in enumerate(zip(grads, expected_grads, strict=True)):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-10)
        assert (grad != 0).any(), f"gradient {i} is 0: this comparison could not fail"


def test_self_attention_uses_q_data_twice(device):
    module = make(device=device)
    q_data = data(module, device)[0]
    assert torch.equal(module(q_data), module(q_data, q_data))


def test_mask_ranks(device):
    module = make(device=device)
    q_data, m_data, mask, _ = data(module, device)
    without_heads = mask.squeeze(-3).expand(*BATCH, Q, K)
    expected = module(q_data, m_data, mask)
    assert torch.equal(module(q_data, m_data, without_heads), expected)
    assert torch.equal(module(q_data, m_data, mask.squeeze(-3)), expected)
    assert torch.equal(module(q_data, m_data, mask.expand(*BATCH, module.num_heads, Q, K)), expected)
    by_head = mask.repeat_interleave(module.num_heads, -3)
    by_head[..., 0, :, :] = True
    assert not torch.equal(module(q_data, m_data, by_head), expected)


def test_without_batch_dimensions(device):
    module = make(device=device)
    q_data, m_data, mask, bias = data(module, device)
    one = module(q_data[0, 1], m_data[0, 1], mask[0, 1], bias[0, 0])
    torch.testing.assert_close(one, module(q_data, m_data, mask, bias)[0, 1], rtol=1e-12, atol=1e-12)


def test_sizes_by_default():
    module = GatedAttention(16, 4)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    assert shapes == {
        "linear_q.weight": (16, 16),
        "linear_k.weight": (16, 16),
        "linear_v.weight": (16, 16),
        "linear_g.weight": (16, 16),
        "linear_g.bias": (16,),
        "linear_o.weight": (16, 16),
        "linear_o.bias": (16,),
    }
    assert module.masked_rows == "mean"
    wide = GatedAttention(16, 4, kv_dim=12, key_dim=8, output_dim=5, q_bias=True, gate_bias=False, output_bias=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in wide.state_dict().items()}
    assert shapes == {
        "linear_q.weight": (8, 16),
        "linear_q.bias": (8,),
        "linear_k.weight": (8, 12),
        "linear_v.weight": (12, 12),
        "linear_g.weight": (12, 16),
        "linear_o.weight": (5, 12),
    }
    assert not any(name.startswith("linear_g") for name in GatedAttention(16, 4, gating=False).state_dict())


def uniform_limit(weight: Tensor, limit: float) -> None:
    """`weight` looks uniform on [-limit, limit]: it stays inside, comes close to both ends and has the deviation."""
    assert weight.abs().max() <= limit
    assert weight.max() > 0.98 * limit
    assert weight.min() < -0.98 * limit
    assert abs(weight.std().item() / (limit / 3**0.5) - 1) < 0.05


def test_initialisation():
    a, m, h, d, v, o = 64, 96, 4, 16, 24, 48
    sizes = {"kv_dim": m, "key_dim": h * d, "value_dim": h * v, "output_dim": o, "q_bias": True}
    module = GatedAttention(a, h, zero_init=False, **sizes)
    uniform_limit(module.linear_q.weight, (6 / (a * (h + d))) ** 0.5)
    uniform_limit(module.linear_k.weight, (6 / (m * (h + d))) ** 0.5)
    uniform_limit(module.linear_v.weight, (6 / (m * (h + v))) ** 0.5)
    uniform_limit(module.linear_o.weight, (6 / (h * (v + o))) ** 0.5)
    assert (module.linear_g.weight == 0).all()
    assert (module.linear_g.bias == 1).all()
    assert (module.linear_q.bias == 0).all()
    assert (module.linear_o.bias == 0).all()
    assert (GatedAttention(a, h, **sizes).linear_o.weight == 0).all()
    assert (GatedAttention(a, h)(torch.randn(3, a)) == 0).all(), "a new module is not the identity of its residual block"


def test_from_alphafold_takes_numpy_arrays():
    rng = np.random.default_rng(0)
    a, m, h, d, v, o = 12, 10, 4, 3, 5, 7
    shapes = {
        "query_w": (a, h, d),
        "key_w": (m, h, d),
        "value_w": (m, h, v),
        "gating_w": (a, h, v),
        "gating_b": (h, v),
        "output_w": (h, v, o),
        "output_b": (o,),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    for gating in (True, False):
        params = {name: array for name, array in arrays.items() if gating or not name.startswith("gating")}
        for array in params.values():
            array.setflags(write=False)  # as arrays of JAX are
        module = GatedAttention.from_alphafold(params)
        assert module.linear_q.weight.dtype == torch.float64
        q_data, m_data, mask, bias = data(module)
        tensors = {name: torch.tensor(array) for name, array in params.items()}
        expected = alphafold_attention(tensors, q_data, m_data, mask, bias, gating, "mean")
        torch.testing.assert_close(module(q_data, m_data, mask, bias), expected, rtol=1e-11, atol=1e-12)
        again = GatedAttention.from_alphafold(tensors, masked_rows="zero", dtype=torch.float32)
        assert again.masked_rows == "zero"
        assert again.linear_q.weight.dtype == torch.float32
        assert again.linear_q.weight.is_leaf
        assert again.linear_q.weight.requires_grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(device, case, tmp_path):
    module = make(device=device, **CASES[case])
    inputs = data(module, device)
    scripted = torch.jit.script(module)
    scripted.save(str(tmp_path / "module.pt"))
    loaded = torch.jit.load(str(tmp_path / "module.pt"))
    frozen = torch.jit.freeze(torch.jit.script(module.eval()))
    expected = module(*inputs)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    for _ in range(3):  # the profiling executor specialises on the second run
        assert torch.equal(loaded(*inputs), expected)
        assert torch.equal(frozen(*inputs), expected)
        grads = torch.autograd.grad(loaded(*inputs).square().sum(), list(loaded.parameters()))
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(loaded(inputs[0], inputs[1]), module(inputs[0], inputs[1]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")  # the module's checks of its arguments
def test_torchscript_trace(device, tmp_path):
    """A traced module takes other sizes than those it was traced with, and trains."""
    module = make(device=device, **CASES["widths that differ"])
    q_data, m_data, mask, bias = data(module, device)
    torch.jit.trace(module, (q_data, m_data, mask, bias)).save(str(tmp_path / "module.pt"))
    loaded = torch.jit.load(str(tmp_path / "module.pt"))
    shorter = q_data[:1, :, :4], m_data[:1, :, :5], mask[:1, ..., :5], bias[:1, ..., :4, :5]
    for inputs in ((q_data, m_data, mask, bias), shorter):
        results = loaded(*inputs), module(*inputs)
        assert torch.equal(*results)
        grads, expected = (
            torch.autograd.grad(result.square().sum(), list(source.parameters()))
            for result, source in zip(results, (loaded, module), strict=True)
        )
        for grad, expected_grad in zip(grads, expected, strict=True):
            assert expected_grad.any()
            torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_copies(device):
    module = make(device=device, **CASES["widths that differ"])
    inputs = data(module, device)
    expected = module(*inputs)
    assert torch.equal(copy.deepcopy(module)(*inputs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(*inputs), expected)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = GatedAttention(Q_DIM, 4, device=device, dtype=torch.float64, **CASES["widths that differ"])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(*inputs), expected)
    assert torch.equal(torch.func.functional_call(other, dict(module.named_parameters()), inputs), expected)


def test_repr():
    assert GatedAttention(16, 4).extra_repr() == "q_dim=16, num_heads=4, gating=True, masked_rows='mean'"
    wide = GatedAttention(16, 4, kv_dim=12, key_dim=8, value_dim=20, output_dim=5, gating=False, masked_rows="zero")
    assert wide.extra_repr() == (
        "q_dim=16, num_heads=4, kv_dim=12, key_dim=8, value_dim=20, output_dim=5, gating=False, masked_rows='zero'"
    )


def test_meta_device_and_dtype():
    module = GatedAttention(16, 4, device="meta", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module(torch.empty(2, 5, 16, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 16)


def test_training_step_changes_every_parameter(device):
    module = GatedAttention(16, 4, device=device, zero_init=False)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(device)
    module(x).square().sum().backward()
    optimizer.step()
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name
