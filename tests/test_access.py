# SPDX-License-Identifier: BSD-3-Clause
"""Where the numbers of a mask bias can be looked at, and what becomes of it where they cannot."""

from __future__ import annotations

import pytest
import torch
from foreign import DIM, HEADS, LENGTH, ROWS, OpenFold, folding, normal, softmax_attention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from torch_gated_attn.integrations import _biases, patch
from torch_gated_attn.integrations._access import Access, access
from torch_gated_attn.integrations.functions import DS4Sci_EvoformerAttention

HIDDEN, SOFT = torch.tensor([0.0, -1e9, 0.0, -torch.inf, -1e4]), -2 * torch.rand(5)


def test_the_ways():
    found = {}

    def look(way):
        def function(x):
            found[way] = access(x)
            return x + 1

        return function

    x = torch.zeros(3)
    access(nn.Parameter(x))
    look("eager")(x)
    look("meta")(x.to("meta"))
    look("a subclass")(x.as_subclass(type("Subclass", (torch.Tensor,), {})))
    look("fake")(FakeTensorMode().from_tensor(x))
    torch.compile(look("compiled"), backend="eager", fullgraph=True)(x)
    torch.vmap(look("vmap"))(x)
    torch.func.jvp(look("jvp"), (x,), (x,))
    torch.func.functionalize(look("functionalize"))(x)
    torch.jit.trace(look("torch.jit.trace"), (x,), check_trace=False)
    make_fx(look("make_fx"))(x)
    with forward_ad.dual_level():
        look("forward mode")(forward_ad.make_dual(x, x))

    class Module(nn.Module):
        def forward(self, x):
            return look("exported")(x)

    torch.export.export(Module(), (x,))
    assert found.pop("eager") is Access.READ
    assert [found.pop(way) for way in ("compiled", "fake")] == [Access.ASSERT] * 2
    assert set(found.values()) == {Access.NONE}, found
    assert len(found) == 9


@pytest.fixture
def elsewhere(monkeypatch):
    """As on a CUDA device: looking is not free, asserting is possible."""
    monkeypatch.setattr(_biases, "access", lambda _: Access.ASSERT)


def test_numbers_that_can_only_be_asserted(elsewhere):
    """Added where the sum is no larger than what is there, asserted where it is; never dropped."""
    pair, rows = normal(2, 1, 3, 4, 5).float(), normal(2, 6, 3, 4, 5).float()
    for shape in ((5,), (1, 1, 5), (2, 1, 1, 1, 5), (1, 1, 1, 1, 1, 5)):
        bias = SOFT.expand(shape)
        for other in (None, rows):
            mask, total = _biases.split(bias, other, torch.float32)
            assert mask is None
            torch.testing.assert_close(total, bias if other is None else bias + other)
    for other in (pair, pair[:1], pair[0, 0]):
        mask, total = _biases.split(HIDDEN.expand(2, 6, 1, 1, 5), other, torch.float32)
        assert mask.shape == (2, 6, 1, 1, 5)
        assert torch.equal(mask[0, 0, 0, 0], HIDDEN == 0)
        assert total is other
        with pytest.raises(RuntimeError, match=r"^the mask bias must be 0 or at most -1e4 everywhere, but holds other"):
            _biases.split(SOFT.expand(2, 6, 1, 1, 5), other, torch.float32)
    for bias in (HIDDEN.clone().requires_grad_(), HIDDEN.expand(4, 5)):
        assert _biases.split(bias, pair, torch.float32)[0] is None


def test_nan_is_no_mask():
    """A NaN hides no key: it is added, as in the original."""
    bias = torch.tensor([0.0, float("nan"), -1e9])
    mask, total = _biases.split(bias, None, torch.float32)
    assert mask is None
    assert total is bias


@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_added_masks_hide_as_in_the_original(low):
    """Also in rows that attend to nothing: in float32 the logits vanish beside such a bias, and the mean of v is left."""
    (x, _, (_, pair)), _ = folding("openfold")
    mask_bias = torch.zeros(2, ROWS, 1, 1, LENGTH)
    mask_bias[..., LENGTH // 2 :] = mask_bias[0, 1] = low
    original, replaced = OpenFold.Attention(), OpenFold.Attention()
    replaced.load_state_dict(original.state_dict())
    patch(replaced)
    arguments = x.float(), pair.float(), mask_bias
    results = [torch.vmap(lambda x, p, b, m=m: m(x, x, [b, p]))(*arguments) for m in (original, replaced)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[1], replaced(arguments[0], arguments[0], [mask_bias, arguments[1]]))


def attention(first, pair):
    """DS4Sci_EvoformerAttention and its formula, with the same tensors."""
    q, k, v = (
        torch.linspace(-1, 1, 2 * ROWS * LENGTH * HEADS * 8).roll(i).view(2, ROWS, LENGTH, HEADS, 8) for i in range(3)
    )
    heads = (x.transpose(-2, -3) for x in (q, k, v))
    expected = softmax_attention(*heads, [first, pair]).transpose(-2, -3)
    return DS4Sci_EvoformerAttention(q, k, v, [first, pair]), expected


def test_traced_with_a_mask_and_run_with_a_bias():
    pair = torch.randn(2, 1, HEADS, LENGTH, LENGTH)
    soft, hidden = -2 * torch.rand(2, ROWS, 1, 1, LENGTH), torch.zeros(2, ROWS, 1, 1, LENGTH)
    hidden[..., 3:6] = -1e9
    traced = torch.jit.trace(lambda first: attention(first, pair)[0], (hidden,), check_trace=False)
    for first in (hidden, soft):
        torch.testing.assert_close(traced(first), attention(first, pair)[1])


def test_vmap_inside_a_compiled_function():
    torch._dynamo.reset()
    pair = torch.randn(2, 1, HEADS, LENGTH, LENGTH)
    soft = -2 * torch.rand(3, 2, ROWS, 1, 1, LENGTH)
    mapped = torch.compile(torch.vmap(lambda first: attention(first, pair)[0]), backend="eager", fullgraph=True)
    for first in (soft, torch.where(soft > -1, 0.0, -1e9)):
        expected = torch.stack([attention(each, pair)[1] for each in first])
        torch.testing.assert_close(mapped(first), expected)


def test_the_meta_device():
    """Memory is planned on the meta device, where a mask has none."""
    with torch.device("meta"):
        module = OpenFold.Attention()
        patch(module)
        x, bias, pair = torch.empty(2, ROWS, LENGTH, DIM), torch.empty(2, ROWS, 1, 1, LENGTH), torch.empty(HEADS, 1, 1)
        assert module(x, x, [bias, pair]).shape == x.shape
