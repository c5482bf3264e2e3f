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
    same(with_gradients(replaced, other, graph), with_gradients(original, other))
    same(with_gradients(replaced, tensors, graph), with_gradients(original, tensors))


def exported(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    graph = torch.export.export(replaced, tuple(other)).module()
    for numbers in (other, tensors):
        same([graph(*numbers)], [original(*numbers)])


def made_fx(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    graph = make_fx(lambda *args: replaced(*args))(*other)
    for numbers in (other, tensors):
        same([graph(*numbers)], [original(*numbers)])


def vmap(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Two samples at once, and their gradients, for the parameters and the tensor in question."""
    samples = [torch.stack((x, x.roll(1, -1))).detach() for x in tensors]
    wrt = (0, len(tensors)) if tensors[-1].requires_grad else 0

    def per_sample(module: nn.Module) -> Callable[..., Tensor]:
        return lambda parameters, *args: functional_call(module, parameters, args).square().sum()

    def flat(found: object) -> Results:
        return torch.utils._pytree.tree_leaves(found)

    parameters = {name: p.detach() for name, p in original.named_parameters()}
    loop = [original(*(x[i] for x in samples)) for i in range(2)]
    same([torch.vmap(replaced)(*samples)], [torch.stack(loop)])
    grads = torch.vmap(grad(per_sample(replaced), wrt), (None, *(0 for _ in samples)))(parameters, *samples)
    each = [flat(grad(per_sample(original), wrt)(parameters, *(x[i] for x in samples))) for i in range(2)]
    same(flat(grads), [torch.stack(pair) for pair in zip(*each, strict=True)])


def fake(original: nn.Module, replaced: nn.Module, tensors: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    expected = with_gradients(original, tensors)
    with FakeTensorMode() as mode:
        parameters = {name: mode.from_tensor(p) for name, p in replaced.named_parameters()}
        inputs = [mode.from_tensor(x) for x in tensors]
        out = functional_call(replaced, parameters, tuple(inputs))
        wrt = [*parameters.values(), *(x for x in inputs if x.requires_grad)]
        found = [out, *(g for g in torch.autograd.grad(out.sum(), wrt, allow_unused=True) if g is not None)]
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


WAYS = {f.__name__: f for f in (eager, compiled, exported, made_fx, vmap, fake)}
# Where a constant bias would be added to a smaller one, torch.compile asserts that it is a mask.
MAY_REFUSE = {"compiled"}


def cell(subject: str, way: str, kind: str) -> str:
    original, replaced = SUBJECTS[subject].make()
    tensors = [list(SUBJECTS[subject].tensors(k)) for k in (kind, "constant" if kind == "mask" else "mask")]
    if tensors[0][-1].dtype != tensors[1][-1].dtype:
        tensors[1] = list(SUBJECTS[subject].tensors(kind))  # of another type than a mask: there is no other kind
    if kind == "differentiable":
        tensors[0][-1].requires_grad_()
        tensors[1][-1].requires_grad_()
    try:
        WAYS[way](original, replaced, *tensors)
    except RuntimeError as error:
        if REFUSED not in str(error) or way not in MAY_REFUSE or kind == "differentiable":
            raise
        return "refuses"
    return "equal"


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
