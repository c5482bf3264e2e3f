# SPDX-License-Identifier: BSD-3-Clause
"""Every shim and every adapter in every way that PyTorch can call it, with a mask, with a constant bias that is no mask,
and with a bias that requires grad: the original's results and gradients to rounding, or an error that names the mask bias.

A graph is also given the numbers of another kind than it was made with. `pytest -s` prints the matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from subjects import KINDS, SUBJECTS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from torch_gated_attn.integrations import _patch, functions

REFUSED = "the mask bias must be 0 or at most -1e4 everywhere, but holds other numbers"
Results = list[Tensor]


def with_gradients(module: nn.Module, tensors: Sequence[Tensor], run: Callable[..., Tensor] | None = None) -> Results:
    """`module` at `tensors`, by `run` if that is another way to call it, with all its gradients."""
    out = (module if run is None else run)(*tensors)
    wrt = [*module.parameters(), *(x for x in tensors if x.requires_grad)]
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
    return [out, *(g for g in torch.autograd.grad(out, wrt, cotangent, allow_unused=True) if g is not None)]


def same(results: Results, expected: Results) -> None:
    # The same constant added to every logit changes nothing: such a gradient is 0, and what is found is rounding.
    largest = max(x.abs().max().item() for x in expected)
    for ours, true in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-7, atol=1e-9 * largest)


def eager(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    same(with_gradients(replaced, tensors), with_gradients(original, tensors))


def compiled(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    torch._dynamo.reset()
    graph = torch.compile(replaced, backend="eager", fullgraph=True)
    same(with_gradients(replaced, tensors, graph), with_gradients(original, tensors))
    raised(lambda: same(with_gradients(replaced, other, graph), with_gradients(original, other)))


def exported(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    graph = torch.export.export(replaced, tuple(tensors)).module()
    for numbers in (tensors, other):
        same([graph(*numbers)], [original(*numbers)])


def made_fx(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    graph = make_fx(lambda *args: replaced(*args))(*tensors)
    for numbers in (tensors, other):
        same([graph(*numbers)], [original(*numbers)])


def vmap(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Two samples at once, and their gradients, for the parameters and the tensor in question."""
    samples = [torch.stack((x, x.roll(1, -1))).detach() for x in tensors]
    parameters = {name: p.detach() for name, p in original.named_parameters()}

    def loss(parameters: dict[str, Tensor], *args: Tensor) -> Tensor:
        return functional_call(replaced, parameters, args).square().sum()

    same([torch.vmap(replaced)(*samples)], [torch.stack([original(*(x[i] for x in samples)) for i in range(2)])])
    wrt = (0, len(tensors)) if tensors[-1].requires_grad else 0
    found = torch.vmap(grad(loss, wrt), (None, *(0 for _ in samples)))(parameters, *samples)
    each = []
    for i in range(2):
        args = [x[i] for x in samples]
        args[-1].requires_grad_(tensors[-1].requires_grad)
        leaves = [*original.parameters(), *(x for x in args if x.requires_grad)]
        each.append(torch.autograd.grad(original(*args).square().sum(), leaves, materialize_grads=True))
    same(tree_leaves(found), [torch.stack(pair) for pair in zip(*each, strict=True)])


def fake(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    expected = with_gradients(original, tensors)
    mode = FakeTensorMode()
    for module in replaced.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else mode.from_tensor(p)
    inputs = [mode.from_tensor(x) for x in tensors]
    with mode:
        out = replaced(*inputs)
        wrt = [*replaced.parameters(), *(x for x in inputs if x.requires_grad)]
        found = [out, *(g for g in torch.autograd.grad(out.sum(), wrt, allow_unused=True) if g is not None)]
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


WAYS = {f.__name__: f for f in (eager, compiled, exported, made_fx, vmap, fake)}
# Where a constant bias would be added to a smaller one, torch.compile asserts that it is a mask.
MAY_REFUSE = ("compiled", "constant")


def cell(subject: str, way: str, kind: str) -> str:
    original, replaced = SUBJECTS[subject].make()
    tensors, other = (list(SUBJECTS[subject].tensors(k)) for k in (kind, "constant" if kind == "mask" else "mask"))
    if [x.dtype for x in tensors] != [x.dtype for x in other]:
        other = list(SUBJECTS[subject].tensors(kind))  # a mask is of another type here
    if kind == "differentiable":
        tensors[-1].requires_grad_()
        other[-1].requires_grad_()
    error = raised(lambda: WAYS[way](original, replaced, tensors, other))
    if error is None:
        return "equal"
    assert (way, kind) == MAY_REFUSE, error
    return "refuses"


def raised(call: Callable[[], None]) -> str | None:
    """The message of the error with which `call` refuses a bias; other errors are raised."""
    try:
        call()
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        return str(error)
    return None


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast at this size, and steady where cores are shared
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_equal_to_the_original_or_refused(subject, way, matrix):
    for kind in KINDS:
        matrix[subject, way, kind] = cell(subject, way, kind)


@pytest.fixture(scope="module")
def matrix():
    return {}


def test_every_cell_is_filled(matrix):
    """Every shim and adapter is a subject, and every subject was called in every way."""
    assert {s.adapter for s in SUBJECTS.values()} - {None} == {a.name for a in _patch.adapters()}
    assert {s.shim for s in SUBJECTS.values()} - {None} == set(functions.__all__)
    if not matrix:
        pytest.skip("the other tests of this file have not run")
    cells = list(itertools.product(SUBJECTS, WAYS, KINDS))
    assert [c for c in cells if c not in matrix] == []
    width = max(map(len, SUBJECTS))
    print(f"\n{'':{width}}  " + "".join(f"{way:24}" for way in WAYS))
    for subject in SUBJECTS:
        columns = ("/".join(matrix[subject, way, kind] for kind in KINDS) for way in WAYS)
        print(f"{subject:{width}}  " + "".join(f"{column:24}" for column in columns))
