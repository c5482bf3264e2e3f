# SPDX-License-Identifier: BSD-3-Clause
"""Replacing under and above the classes and methods that wrappers put on a module: given back, or refused, never half."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from foreign import OpenFold, folding
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from torch_gated_attn.integrations import patch, patched, unpatch


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OpenFold.Attention() for _ in range(2))

    def forward(self, x, biases):
        for block in self.blocks:
            x = x + block(x, x, biases)
        return x


def call():
    (x, _, biases), _ = folding("openfold")
    return x.float(), [b.float() for b in biases]


def wrapped(module: nn.Module, name: str = "Wrapped") -> None:
    """Puts a class before the module's, as fully_shard does."""
    module.__class__ = type(name, (type(module),), {"extra": lambda self: "extra"})


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def given_back(model: nn.Module, arguments, expected: torch.Tensor, count: int) -> None:
    """`unpatch` returns `count`, and the results are the original's bit for bit."""
    assert unpatch(model) == count
    assert unpatch(model) == 0
    assert torch.equal(model(*arguments), expected)


def test_fully_shard_after_patch(mesh):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = Model()
    arguments = call()
    expected = model(*arguments).detach()
    patch(model)
    replaced = model(*arguments).detach()
    assert not torch.equal(replaced, expected), "both paths round alike: this test could not fail"
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    assert torch.equal(model(*arguments), replaced)
    assert {m.note for m in patch(model).left} == {"already replaced"}
    given_back(model, arguments, expected, 2)
    assert all(isinstance(block, FSDPModule) and isinstance(block, OpenFold.Attention) for block in model.blocks)
    model(*arguments).sum().backward()
    # And above the sharded class.
    assert len(patch(model).replaced) == 2
    assert torch.equal(model(*arguments), replaced)
    given_back(model, arguments, expected, 2)


def test_parametrize_after_patch():
    attention = OpenFold.Attention()
    attention.register_parameter("extra", nn.Parameter(torch.ones(3)))
    patch(attention)
    replaced = type(attention)
    parametrize.register_parametrization(attention, "extra", Doubled())
    assert [m.note for m in patch(attention).left] == ["already replaced"]
    assert unpatch(attention) == 1
    assert torch.equal(attention.extra, torch.full((3,), 2.0))
    parametrize.remove_parametrizations(attention, "extra")
    assert type(attention) is OpenFold.Attention
    # Above a parametrized class the parametrization could not be removed.
    parametrize.register_parametrization(attention, "extra", Doubled())
    why = "it is parametrized, which could not be removed under another class; patch before that"
    assert [m.note for m in patch(attention).left] == [why]
    assert replaced not in type(attention).__mro__


def test_two_wrappers_and_a_copy():
    model = Model()
    arguments = call()
    expected = model(*arguments).detach()
    patch(model)
    for block in model.blocks:
        wrapped(block, "Inner")
        wrapped(block, "Outer")
    assert {m.note for m in patch(model).left} == {"already replaced"}
    other = copy.deepcopy(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    for each in (model, other):
        given_back(each, arguments, expected, 2)
        assert [c.__name__ for c in type(each.blocks[0]).__mro__][:4] == ["Outer", "Inner", "Attention", "Projections"]
        assert each.blocks[0].extra() == "extra"


def test_wrappers_inside_the_context():
    model = Model()
    arguments = call()
    expected = model(*arguments).detach()
    with patched(model) as report:
        assert len(report.replaced) == 2
        wrapped(model.blocks[0])
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])  # another path to the same module
    assert unpatch(model) == 0
    assert torch.equal(model(*arguments), expected)


def test_a_forward_that_a_wrapper_keeps():
    """As accelerate's hooks do: the bound method of the replaced class stays, and calls the original once given back."""
    attention = OpenFold.Attention()
    x, biases = call()
    expected = attention(x, x, biases)
    patch(attention)
    kept = attention.forward
    attention.forward = lambda *args: kept(*args)
    assert not torch.equal(attention(x, x, biases), expected)
    assert unpatch(attention) == 1
    assert torch.equal(attention(x, x, biases), expected)


def method(base):
    class Stubborn(base):
        def extra_repr(self):
            return super().extra_repr()

    return Stubborn


def named(base):
    class Stubborn(base):
        def extra_repr(self):
            return super(Stubborn, self).extra_repr()  # noqa: UP008

    return Stubborn


def computed(base):
    class Stubborn(base):
        @property
        def extra_repr(self):
            return super().extra_repr

    return Stubborn


@pytest.mark.parametrize("make", [method, named, computed])
def test_what_cannot_be_given_back_is_refused_whole(make):
    model = Model()
    patch(model)
    before = type(model.blocks[1])
    model.blocks[1].__class__ = make(before)
    message = r"Stubborn was put before a replaced class, and cannot be put before the original, because its extra_repr"
    with pytest.raises(RuntimeError, match=message):
        unpatch(model)
    assert {m.note for m in patch(model).left} == {"already replaced"}
    model.blocks[1].__class__ = before
    assert unpatch(model) == 2
