# SPDX-License-Identifier: BSD-3-Clause
"""Every module as TorchScript, as an fx graph, exported and compiled: the result and gradients of the module itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import modules
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


def compare(module: nn.Module, graph: Callable[..., Tensor], graph_parameters: list[nn.Parameter], arguments) -> None:
    out, grads = modules.results(module, list(module.parameters()), arguments)
    again, graph_grads = modules.results(graph, graph_parameters, arguments)
    torch.testing.assert_close(again, out, rtol=1e-12, atol=1e-12)
    assert out.abs().max() > 0
    for grad, expected in zip(graph_grads, grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", modules.MODULES)
def test_torchscript(name):
    module = modules.make(name)
    scripted = torch.jit.script(module)
    for arguments in modules.calls(name):
        for _ in range(3):  # the profiling executor specialises on the second run
            compare(module, scripted, list(scripted.parameters()), arguments)


@pytest.mark.parametrize("name", modules.MODULES)
def test_fx(name):
    """With the arguments that are left out, at other sizes, copied and pickled."""
    module = modules.make(name)
    traced = torch.fx.symbolic_trace(module)
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        parameters = [graph.get_parameter(parameter) for parameter, _ in module.named_parameters()]
        for arguments in [*modules.calls(name), *modules.calls(name, sequences=2, length=8)]:
            compare(module, graph, parameters, arguments)


@pytest.mark.parametrize("name", modules.MODULES)
def test_fx_graphs_check_their_arguments(name):
    """A graph that is used with wrong arguments says what the module says."""
    module = modules.make(name)
    traced = torch.fx.symbolic_trace(module)
    data, *others = modules.calls(name)[0]
    wrong = {
        "width": (data[..., 1:], *others),
        "mask's dtype": (data, *(x.float() if x is not None and x.dtype == torch.bool else x for x in others)),
        "mask's shape": (data, *(x[..., 1:] if x is not None and x.dtype == torch.bool else x for x in others)),
    }
    for what, arguments in wrong.items():
        said = []
        for function in (module, traced):
            with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
                function(*arguments)
            said.append(str(raised.value).split("\n")[0])
        assert said[0] == said[1], what


@pytest.mark.parametrize("name", modules.MODULES)
def test_compiled_and_exported(name):
    module = modules.make(name)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for arguments in modules.calls(name):
        compare(module, compiled, list(module.parameters()), arguments)
        exported = torch.export.export(module, arguments).module()
        compare(module, exported, [exported.get_parameter(n) for n, _ in module.named_parameters()], arguments)
