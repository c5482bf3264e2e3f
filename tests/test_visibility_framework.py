# SPDX-License-Identifier: BSD-3-Clause
"""Causal calls, windows and key lengths under PyTorch's tools; opcheck, meta and eager graphs of them are in samples.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from inputs import DIFFERENTIABLE, Inputs, assert_identical, draw, evaluate
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torch_gated_attn import GatedAttention, gated_attention, gated_attention_with_lse, reference

TORCHSCRIPT = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
SEEN = {
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 2},
    "lengths": {"key_lengths": [3, 4]},
    "all": {"is_causal": True, "window": 3, "key_lengths": [4, 2]},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def small(device: str, seen: str, **changes: object) -> Inputs:
    sizes = {"batch": (2,), "heads": 2, "kv_heads": 1, "q": 3, "k": 4, "d": 3, "dv": 2, "bias": (2, 3, 4), "mask": None}
    return draw(**{"seed": 6, "dtype": torch.float64, "device": device, **sizes, **SEEN[seen], **changes})


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs.tensors[:5]]


def compiled_with(dynamic: bool, seen: dict[str, object], counter: CompileCounterWithBackend):
    def operator(*args, key_lengths=None):
        options = {**seen, "key_lengths": key_lengths} if key_lengths is not None else seen
        return gated_attention_with_lse(*args, **options)

    return torch.compile(operator, fullgraph=True, dynamic=dynamic, backend=counter)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_one_graph_for_all_lengths(device, seen, dynamic, graphs):
    counter = CompileCounterWithBackend("aot_eager")
    options = {name: x for name, x in SEEN[seen].items() if name != "key_lengths"}
    compiled = compiled_with(dynamic, options, counter)
    for batch, q, k in ((3, 9, 11), (5, 20, 33), (4, 40, 19), (7, 65, 65)):
        lengths = torch.arange(batch) * 3 if "key_lengths" in SEEN[seen] else None
        inputs = draw(seed=q, device=device, batch=(batch,), q=q, k=k, bias=(1, 2, q, k), key_lengths=lengths, **options)
        ours = evaluate(lambda *a, lengths=lengths, **_: compiled(*a, key_lengths=lengths), inputs)
        assert_identical(evaluate(gated_attention_with_lse, inputs), ours, (q, k))
    # Equal lengths of query and key are one size to Dynamo, which it may tell apart once.
    assert counter.frame_count <= graphs + (dynamic is None)
    assert counter.frame_count >= graphs


def test_inductor(device):
    inputs = draw(seed=1, device=device, **{**SEEN["all"], "key_lengths": [11, 4]})
    compiled = torch.compile(gated_attention_with_lse, fullgraph=True)
    assert_identical(evaluate(gated_attention_with_lse, inputs), evaluate(compiled, inputs), "inductor")


class Call(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        return gated_attention(query, key, value, is_causal=True, window=4, key_lengths=lengths)


def decoder_call(batch: int, q: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = draw(seed=q, batch=(batch,), heads=4, kv_heads=2, q=q, k=k)
    return x.query, x.key, x.value, torch.randint(0, k + 1, (batch,), dtype=torch.int32)


def test_export_with_dynamic_lengths():
    batch, q, k = (torch.export.Dim(name, min=2, max=4096) for name in ("batch", "q", "k"))
    dynamic = ({0: batch, 2: q}, {0: batch, 2: k}, {0: batch, 2: k}, {0: batch})
    program = torch.export.export(Call(), decoder_call(3, 9, 11), dynamic_shapes=dynamic)
    for decomposed in (program, program.run_decompositions()):
        for sizes in ((3, 9, 11), (5, 40, 21), (2, 7, 70)):
            arguments = decoder_call(*sizes)
            assert torch.equal(decomposed.module()(*arguments), Call()(*arguments))


def scripted(
    query: Tensor, key: Tensor, is_causal: bool, window: int | None, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.ops.torch_gated_attn.gated_attention_with_lse(
        query, key, key, is_causal=is_causal, window=window, key_lengths=key_lengths
    )


@TORCHSCRIPT
def test_torchscript():
    function = torch.jit.script(scripted)
    for seen in SEEN.values():
        inputs = draw(seed=1, kv_heads=1, **seen)
        query, expected_query = (inputs.query.detach().clone().requires_grad_() for _ in range(2))
        ours, expected = (
            function(query, inputs.key, *inputs.visibility),
            scripted(expected_query, inputs.key, *inputs.visibility),
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        (a,), (b,) = (torch.autograd.grad(y[0].square().sum(), x) for y, x in ((ours, query), (expected, expected_query)))
        assert torch.equal(a, b)
        assert b.any()


@TORCHSCRIPT
def test_trace_keeps_lengths_dynamic():
    traced = torch.jit.trace(Call(), decoder_call(3, 9, 11))
    for sizes in ((3, 9, 11), (5, 40, 21), (2, 7, 70)):
        arguments = decoder_call(*sizes)
        assert torch.equal(traced(*arguments), Call()(*arguments))


def test_autocast(device):
    """Lengths are no float; the rest is cast as in every call."""
    inputs = draw(seed=1, device=device, **{**SEEN["all"], "key_lengths": [11, 4]}, lse=False)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = gated_attention(*inputs.tensors, **inputs.options)
    low = [x.bfloat16() if x.is_floating_point() else x for x in inputs.tensors]
    low[4] = inputs.bias
    assert torch.equal(out, gated_attention(*low, **inputs.options))


def test_flops_are_those_of_all_keys(device):
    counts = []
    for seen in ({}, *SEEN.values()):
        inputs = small(device, "causal").replace(is_causal=False)
        options = (
            {**seen, "key_lengths": torch.tensor(seen["key_lengths"], device=device)} if "key_lengths" in seen else seen
        )
        with FlopCounterMode(display=False) as counter:
            gated_attention(*leaves_of(inputs), **options).sum().backward()
        counts.append(counter.get_total_flops())
    product = 2 * 2 * 2 * 3 * 4
    assert counts == [product * (3 + 2) + product * (3 * 3 + 2 * 2)] * len(counts)


def test_checkpoint_and_compiled_autograd(device):
    inputs = draw(seed=1, device=device, **{**SEEN["all"], "key_lengths": [11, 4]})
    expected = evaluate(gated_attention_with_lse, inputs)

    def recomputed(*args, **options):
        return checkpoint(gated_attention_with_lse, *args, use_reentrant=False, **options)

    assert_identical(expected, evaluate(recomputed, inputs), "checkpoint")
    leaves = leaves_of(inputs)

    @torch.compile(backend="aot_eager")
    def step():
        out, lse = gated_attention_with_lse(*leaves, inputs.mask, **inputs.options)
        torch.autograd.backward((out, lse), (inputs.grad_out, inputs.grad_lse))

    with torch._dynamo.config.patch(compiled_autograd=True):
        step()
    for name, leaf in zip(DIFFERENTIABLE, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected[f"d_{name}"], rtol=1e-6, atol=1e-7)


def module_and_data() -> tuple[GatedAttention, Tensor, dict[str, object]]:
    module = GatedAttention(16, 4, zero_init=False, masked_rows="zero")
    x = torch.randn(3, 7, 16)
    return module, x, {"is_causal": True, "window": 3, "key_lengths": torch.tensor([7, 5, 0])}


def test_module_equals_a_mask_written_out():
    module, x, options = module_and_data()
    for chosen in ({"is_causal": True}, {"is_causal": True, "window": 3}, options):
        seen = {"is_causal": False, "window": None, "key_lengths": None} | chosen
        mask = reference._visible(7, 7, *seen.values(), x.device).expand(3, 1, 7, 7)
        results = [module(x, **chosen), module(x, mask=mask)]
        cotangent = torch.randn_like(x)
        grads = [torch.autograd.grad(y, list(module.parameters()), cotangent) for y in results]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@TORCHSCRIPT
def test_module_scripts_traces_and_exports():
    module, x, options = module_and_data()
    expected = module(x, **options)
    assert torch.equal(torch.jit.script(module)(x, **options), expected)
    assert torch.equal(torch.fx.symbolic_trace(module)(x, None, None, None, **options), expected)
    length = torch.export.Dim("length", min=2, max=1024)
    shapes = {"q_data": {1: length}, "is_causal": None, "window": None, "key_lengths": None}
    program = torch.export.export(module, (x,), options, dynamic_shapes=shapes)
    longer = torch.randn(3, 40, 16)
    for y in (x, longer):
        assert torch.equal(program.module()(y, **options), module(y, **options))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, **options), expected)


def test_every_pair_of_arguments_through_the_op(device):
    """As a default, by keyword, and through the functional ops by position: the same bits."""
    ops = torch.ops.torch_gated_attn
    for seen, masked_rows in itertools.product(SEEN, ("zero", "mean")):
        inputs = small(device, seen, masked_rows=masked_rows)
        out = gated_attention(*inputs.tensors, **inputs.options)
        forward = ops._gated_attention_forward(*inputs.tensors, inputs.scale, masked_rows, *inputs.visibility)
        assert torch.equal(out, ops.gated_attention(*inputs.tensors, **inputs.options))
        assert torch.equal(out, forward[0])
