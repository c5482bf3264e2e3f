# SPDX-License-Identifier: BSD-3-Clause
"""Which operators ran, in eager mode and in compiled graphs: a silent slow path shows as the wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

FORWARD, BACKWARD = "_gated_attention_forward", "_gated_attention_backward"


class Called(TorchDispatchMode):
    """Records the names of the operators that reach a kernel inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def ours(self) -> list[str]:
        return [name for name in self.names if name in (FORWARD, BACKWARD)]


class Graphs:
    """A backend of torch.compile that runs graphs eagerly and keeps what each one calls."""

    def __init__(self) -> None:
        self.forward: list[list[str]] = []
        self.backward: list[list[str]] = []

    @property
    def backend(self) -> Callable[..., Any]:
        return aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    def _keep(self, graphs: list[list[str]]) -> Callable[..., Any]:
        def compile_graph(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
            graphs.append([name_of(node) for node in graph.graph.nodes if node.op == "call_function"])
            return torch._functorch.aot_autograd.make_boxed_func(graph.forward)

        return compile_graph


def name_of(node: torch.fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(packet.__name__)
