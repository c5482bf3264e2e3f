# SPDX-License-Identifier: BSD-3-Clause
"""What is no tensor, and a scale that is one: the Python functions refuse them by name, before PyTorch's own words."""

from __future__ import annotations

import inspect

import modules
import numpy as np
import pytest
import torch
from inputs import draw

import torch_gated_attn
from torch_gated_attn import explain, gate_output, gated_attention, gated_attention_with_lse
from torch_gated_attn.integrations import functions

NAMES = ("query", "key", "value", "gate", "bias", "mask")
FUNCTIONS = {"gated_attention": gated_attention, "gated_attention_with_lse": gated_attention_with_lse, "explain": explain}


def arguments() -> dict[str, object]:
    return dict(zip(NAMES, draw(seed=1, batch=(2,), heads=2, q=3, k=5, d=4).tensors, strict=True))


NO_TENSORS = {
    "numpy.ndarray": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "float": lambda x: 1.0,
    "str": lambda x: "x",
}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_that_are_no_tensors(function, name, kind):
    call = arguments()
    call[name] = NO_TENSORS[kind](call[name])
    expected = "a torch.Tensor" if name in ("query", "key", "value") else "a torch.Tensor or None"
    with pytest.raises(TypeError) as raised:
        FUNCTIONS[function](**call)
    assert str(raised.value) == f"{name} must be {expected}, but is a {kind}"


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_tensors_that_are_missing(function, name):
    with pytest.raises(TypeError) as raised:
        FUNCTIONS[function](**{**arguments(), name: None})
    assert str(raised.value) == f"{name} must be a torch.Tensor, but is None"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_key_lengths(function):
    with pytest.raises(TypeError) as raised:
        FUNCTIONS[function](**arguments(), key_lengths=np.array([1, 2]))
    assert str(raised.value) == "key_lengths must be a torch.Tensor or None, but is a numpy.ndarray"


@pytest.mark.parametrize("name", ["out", "gate"])
def test_gate_output(name):
    call = {"out": torch.zeros(2, 3), "gate": torch.zeros(2, 3)}
    for wrong, kind in ((np.zeros((2, 3)), "a numpy.ndarray"), (None, "None")):
        with pytest.raises(TypeError) as raised:
            gate_output(**{**call, name: wrong})
        assert str(raised.value) == f"{name} must be a torch.Tensor, but is {kind}"


@pytest.mark.parametrize("name", modules.MODULES)
def test_modules(name):
    module, arguments = modules.make(name), modules.calls(name)[0]
    parameters = inspect.signature(module.forward).parameters
    for i, (argument, default) in enumerate(zip(arguments, parameters.values(), strict=False)):
        wrong = [*arguments[:i], argument.detach().numpy(), *arguments[i + 1 :]]
        with pytest.raises(TypeError) as raised:
            module(*wrong)
        optional = " or None" if "None" in str(default.annotation) else ""
        assert str(raised.value) == f"{default.name} must be a torch.Tensor{optional}, but is a numpy.ndarray"


SCALES = {
    "parameter": torch.nn.Parameter(torch.tensor(0.5)),
    "tensor": torch.tensor(0.5),
    "tensor of a whole number": torch.tensor(1),
    "tensor per head": torch.ones(2, 1, 1),
}
SCALE = "scale must be a number, but is a tensor, whose gradient would be lost: multiply query by it and pass scale=1.0"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_tensor_as_scale(function, scale):
    with pytest.raises(TypeError) as raised:
        FUNCTIONS[function](**arguments(), scale=SCALES[scale])
    assert str(raised.value) == SCALE


@pytest.mark.parametrize("scale", SCALES)
def test_a_tensor_as_scale_of_a_shim(scale):
    q, bias = torch.zeros(1, 2, 2, 3, 4), torch.zeros(1, 1, 2, 3, 3)
    for auxiliary in (False, True):
        with pytest.raises(TypeError) as raised:
            functions.triangle_attention(q, q, q, bias, scale=SCALES[scale], return_aux=auxiliary)
        assert str(raised.value) == SCALE


def test_the_scale_that_the_error_asks_for():
    """query times a parameter, with scale 1: the parameter's gradient is that of the formula."""
    call = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in arguments().items()}
    gradients = []
    for function in (gated_attention, torch_gated_attn.reference.gated_attention):
        scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        out = function(**{**call, "query": call["query"] * scale}, scale=1.0)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gradients += torch.autograd.grad(out, scale, cotangent)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[1] != 0


def test_numbers_as_scale():
    call = arguments()
    expected = gated_attention(**call, scale=2.0)
    for scale in (2, np.float64(2.0), np.float32(2.0), np.int64(2)):
        assert torch.equal(gated_attention(**call, scale=scale), expected)


class Heads(torch.nn.Module):
    def forward(self, query, key, value, gate, bias, mask):
        return gated_attention(query, key, value, gate, bias, mask, scale=2 * query.size(-1) ** -0.5)


class HeadsWithLse(torch.nn.Module):
    def forward(self, query, key, value, gate, bias, mask):
        return gated_attention_with_lse(query, key, value, gate, bias, mask)[0]


def test_functions_in_an_fx_graph():
    call = arguments()
    graph = torch.fx.symbolic_trace(Heads())
    assert torch.equal(graph(*call.values()), Heads()(*call.values()))
    graph = torch.fx.symbolic_trace(HeadsWithLse())
    assert torch.equal(graph(*call.values()), gated_attention(**call))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_checks_do_not_break_a_graph(dynamic):
    call = list(arguments().values())
    expected = Heads()(*call)
    torch.compiler.reset()
    compiled = torch.compile(Heads(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert torch.equal(compiled(*call), expected)
    assert torch.equal(torch.export.export(Heads(), tuple(call)).module()(*call), expected)
