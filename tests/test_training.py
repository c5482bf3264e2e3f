# SPDX-License-Identifier: BSD-3-Clause
"""What a training loop does around the operator: checkpointing, hooks, retained graphs, modes, adapters, ensembles."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from called import BACKWARD, FORWARD, Called
from inputs import DIFFERENTIABLE, DTYPES, assert_identical, draw, evaluate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from torch_gated_attn import OPS_TO_SAVE, GatedAttention, gated_attention, gated_attention_with_lse


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device, use_reentrant):
    inputs = draw(seed=10, device=device)

    def checkpointed(*tensors, **_):
        return checkpoint(gated_attention_with_lse, *tensors, use_reentrant=use_reentrant)

    if use_reentrant:  # it does not take part in autograd.grad
        leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
        torch.autograd.backward(checkpointed(*leaves, inputs.mask), (inputs.grad_out, inputs.grad_lse))
        results = {f"d_{name}": leaf.grad for name, leaf in zip(DIFFERENTIABLE, leaves, strict=True)}
        expected = evaluate(gated_attention_with_lse, inputs)
        assert_identical({name: expected[name] for name in results}, results, "checkpoint")
    else:
        assert_identical(evaluate(gated_attention_with_lse, inputs), evaluate(checkpointed, inputs), "checkpoint")


@pytest.mark.parametrize("selective", [False, True])
def test_selective_checkpoint(device, selective):
    """OPS_TO_SAVE keeps the result of the attention; everything around it is computed again."""
    inputs = draw(seed=10, device=device)
    options = {"context_fn": partial(create_selective_checkpoint_contexts, OPS_TO_SAVE)} if selective else {}

    def layer(query, *rest, **_):
        out, lse = gated_attention_with_lse(query.sinh(), *rest)
        return out.tanh(), lse

    checkpointed = lambda *tensors, **_: checkpoint(layer, *tensors, use_reentrant=False, **options)  # noqa: E731
    with Called() as called:
        results = evaluate(checkpointed, inputs)
    assert called.ours == ([FORWARD, BACKWARD] if selective else [FORWARD, FORWARD, BACKWARD])
    assert called.names.count("sinh") == 2
    assert_identical(evaluate(layer, inputs), results, "selective checkpoint")


def test_saved_tensor_hooks(device):
    inputs = draw(seed=11, device=device)
    packed = []

    def hooked(*tensors, **options):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.numel()) or x.clone(), lambda x: x):
            return gated_attention_with_lse(*tensors, **options)

    assert_identical(evaluate(gated_attention_with_lse, inputs), evaluate(hooked, inputs), "hooks")
    query, logits = inputs.query.numel(), inputs.bias.numel()
    assert packed
    assert max(packed) <= max(query, inputs.value.numel(), inputs.grad_out.numel(), logits)


def test_a_retained_graph_gives_the_same_gradients_again(device):
    inputs = draw(seed=12, device=device)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    results, cotangents = gated_attention_with_lse(*leaves, inputs.mask), (inputs.grad_out, inputs.grad_lse)
    first = torch.autograd.grad(results, leaves, cotangents, retain_graph=True)
    again = torch.autograd.grad(results, leaves, cotangents)
    for a, b in zip(first, again, strict=True):
        assert a.any()
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(results, leaves, cotangents)


def test_writing_into_the_result_is_noticed(device):
    """The backward reads out: changing it in place must raise, not give wrong gradients."""
    inputs = draw(seed=12, device=device, lse=False)
    query = inputs.query.detach().requires_grad_()
    out = gated_attention(*inputs.replace(query=query).tensors)
    scaled = out * 1.0
    scaled.mul_(2)
    scaled.sum().backward(retain_graph=True)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inference_mode_and_no_grad(device):
    inputs = draw(seed=13, device=device)
    expected = gated_attention(*inputs.tensors)
    leaves = inputs.replace(query=inputs.query.detach().requires_grad_())
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = gated_attention(*leaves.tensors)
        assert torch.equal(out, expected)
        assert not out.requires_grad


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_mode_changes_nothing(device, dtype, fill, recwarn):
    """Nor does NaN in whatever memory PyTorch allocates: no result depends on what was there before."""
    inputs = draw(seed=14, dtype=dtype, device=device, mask="full", bias=(1, 2, 9, 11))
    expected = evaluate(gated_attention_with_lse, inputs)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        assert torch.empty(1, dtype=dtype, device=device).isnan().item() or not fill
        assert_identical(expected, evaluate(gated_attention_with_lse, inputs), "deterministic mode")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills
    assert not any(result.isnan().any() for result in expected.values())
    assert not [warning for warning in recwarn if "determin" in str(warning.message)]


class LowRank(nn.Module):
    """LoRA: a frozen layer and a product of two small matrices beside it."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, dtype=layer.weight.dtype) * 0.3)
        self.up = nn.Parameter(torch.randn(layer.out_features, rank, dtype=layer.weight.dtype) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def random_module(device: str) -> GatedAttention:
    return GatedAttention(16, 4, device=device, dtype=torch.float64, zero_init=False)


def random_data(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


def test_low_rank_adapters(device):
    """Adapted projections equal a module with the products added to its weights; only the adapters get gradients."""
    adapted, merged, x = random_module(device), random_module(device), random_data(device, 2, 7, 16)
    merged.load_state_dict(adapted.state_dict())
    adapted.requires_grad_(False)
    for name in ("linear_q", "linear_v"):
        adapter = LowRank(getattr(adapted, name), rank=3).to(device)
        setattr(adapted, name, adapter)
        with torch.no_grad():
            getattr(merged, name).weight += adapter.up @ adapter.down
    results, cotangent = [module(x) for module in (adapted, merged)], random_data(device, 2, 7, 16)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    for result in results:
        result.backward(cotangent)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {f"linear_{x}.{part}" for x in "qv" for part in ("down", "up")}
    for name in ("linear_q", "linear_v"):
        adapter, weight_grad = getattr(adapted, name), getattr(merged, name).weight.grad
        torch.testing.assert_close(adapter.up.grad, weight_grad @ adapter.down.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(adapter.down.grad, adapter.up.T @ weight_grad, rtol=1e-10, atol=1e-12)


def test_functional_call_of_an_ensemble(device):
    """Several modules as one: parameters stacked, functional_call under vmap and under grad."""
    modules, x = [random_module(device) for _ in range(3)], random_data(device, 2, 7, 16)
    params, buffers = torch.func.stack_module_state(modules)

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(modules[0], (params, buffers), (x,)).square().sum()

    losses = torch.vmap(loss)(params, buffers)
    grads = torch.vmap(torch.func.grad(loss))(params, buffers)
    for i, module in enumerate(modules):
        expected = module(x).square().sum()
        torch.testing.assert_close(losses[i], expected, rtol=1e-12, atol=1e-12)
        expected.backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad.any()
            torch.testing.assert_close(grads[name][i], parameter.grad, rtol=1e-10, atol=1e-11)


def test_memory_stays_flat_through_errors_and_skipped_backwards(device):
    """200 iterations, some raising and some never reaching a backward: nothing accumulates."""
    resource = pytest.importorskip("resource")
    inputs = draw(seed=15, device=device, batch=(64,), q=64, k=64, d=32, bias=(1, 2, 64, 64))

    def iterate(n: int) -> None:
        for i in range(n):
            leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
            out = gated_attention(*leaves, inputs.mask)
            if i % 3 == 0:
                out.backward(inputs.grad_out)
            if i % 3 == 1:
                with pytest.raises(ValueError, match="masked_rows"):
                    gated_attention(*leaves, inputs.mask, masked_rows="nan")

    iterate(30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    iterate(200)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 * 1024, f"{grown} KiB more"
