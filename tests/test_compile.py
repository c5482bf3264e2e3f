# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile: whole graphs with one node for the operator, the same bits as eager, no needless recompilation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from called import BACKWARD, FORWARD, Graphs, name_of
from inputs import assert_identical, draw, evaluate
from samples import SAMPLES, draw_sample
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from torch_gated_attn import OPS_TO_SAVE, GatedAttention, gated_attention, gated_attention_with_lse


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("sample", SAMPLES)
def test_whole_graph(device, sample):
    inputs = draw_sample(sample, device)
    options = inputs.options  # how the tests choose them is not to be compiled

    def operator(*tensors, **_):
        out, lse = gated_attention_with_lse(*tensors, **options)
        return out * 1.5, lse

    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    assert_identical(evaluate(operator, inputs), evaluate(compiled, inputs), "compiled")


def test_the_operator_is_one_node(device):
    """In Dynamo's graph the public operator, below autograd one forward and one backward; nothing else computes."""
    inputs, seen, graphs = draw(seed=1, device=device, lse=False), [], Graphs()

    def backend(graph, example_inputs):
        seen.append([name_of(node) for node in graph.graph.nodes if node.op == "call_function"])
        return graphs.backend(graph, example_inputs)

    compiled = torch.compile(gated_attention, fullgraph=True, backend=backend)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    torch.autograd.grad(compiled(*leaves, inputs.mask), leaves, inputs.grad_out)
    assert seen == [["gated_attention"]]
    compute = lambda names: [name for name in names if name not in ("getitem", "detach")]  # noqa: E731
    (forward,), (backward,) = graphs.forward, graphs.backward
    assert (compute(forward), compute(backward)) == ([FORWARD], [BACKWARD])


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_new_sizes_compile_nothing_new(device, dynamic, graphs):
    """One graph for all sizes; by default the first one is for the first sizes only, as for every operator."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *args: gated_attention_with_lse(*args), fullgraph=True, dynamic=dynamic, backend=counter
    )
    # Sizes that are equal in the first call would be taken for one size.
    for batch, q, k in ((3, 9, 11), (5, 20, 33), (4, 7, 19), (7, 64, 65)):
        inputs = draw(seed=q, device=device, batch=(batch,), q=q, k=k, bias=(1, 2, q, k))
        assert_identical(evaluate(gated_attention_with_lse, inputs), evaluate(lambda *a, **_: compiled(*a), inputs), (q, k))
    assert counter.frame_count == graphs


def module_and_data(device: str) -> tuple[GatedAttention, torch.Tensor, torch.Tensor]:
    module = GatedAttention(16, 4, device=device, zero_init=False)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(2, 1, 7, dtype=torch.bool, device=device)
    mask[:, :, 5:] = False
    return module, x, mask


def compare_training(module, function, expected_function) -> None:
    result, expected = function(), expected_function()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    parameters = list(module.parameters())
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), parameters) for y in (result, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (expected_grad != 0).any()
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_module_by_inductor(device):
    module, x, mask = module_and_data(device)
    compiled = torch.compile(module, fullgraph=True)
    compare_training(module, lambda: compiled(x, mask=mask), lambda: module(x, mask=mask))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_reduce_overhead_on_cuda():
    module, x, mask = module_and_data("cuda")
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warm-up, recording, replay
        torch.compiler.cudagraph_mark_step_begin()
        compare_training(module, lambda: compiled(x, mask=mask), lambda: module(x, mask=mask))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("selective", [False, True])
def test_module_under_checkpoint(device, selective):
    """The compiled backward recomputes the operator, unless selective checkpointing says to save it."""
    module, x, mask = module_and_data(device)
    graphs = Graphs()
    options = {"context_fn": partial(create_selective_checkpoint_contexts, OPS_TO_SAVE)} if selective else {}
    recomputed = lambda: checkpoint(module, x, None, mask, use_reentrant=False, **options)  # noqa: E731
    compiled = torch.compile(recomputed, fullgraph=True, backend=graphs.backend)
    compare_training(module, compiled, lambda: module(x, mask=mask))
    (forward,), (backward,) = graphs.forward, graphs.backward
    assert forward.count(FORWARD) == 1
    assert backward.count(BACKWARD) == 1
    assert backward.count(FORWARD) == (0 if selective else 1)


def test_compiled_autograd(device):
    module, x, mask = module_and_data(device)
    expected = torch.autograd.grad(module(x, mask=mask).square().sum(), list(module.parameters()))

    @torch.compile(backend="aot_eager")
    def step():
        module(x, mask=mask).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        step()
    for parameter, grad in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6)


def test_double_backward_of_a_compiled_call_says_no(device):
    """A limit of torch.compile itself; it must be an error, not a wrong second derivative."""
    inputs = draw(seed=2, device=device)
    query = inputs.query.detach().requires_grad_()
    compiled = torch.compile(gated_attention, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(query, *inputs.tensors[1:]).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(grad.sum(), query)
