# SPDX-License-Identifier: BSD-3-Clause
"""What `integrations.patch` does to a model, and what it leaves alone."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from types import SimpleNamespace

import foreign
import foreign_alphafold3
import pytest
import torch
from foreign import DIM, LENGTH, Boltz, EsmFoldSelfAttention, OpenFold, Protenix, Qwen3NextAttention
from foreign_alphafold3 import AlphaFold3Pytorch, Foundry
from torch import nn

from torch_gated_attn import gated_attention
from torch_gated_attn.integrations import _biases, _patch, patch, patched, unpatch


class Triangle(nn.Module):
    """A block around an attention, as models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.mha = OpenFold.Attention()

    def forward(self, x, biases):
        x = self.norm(x)
        return self.mha(x, x, biases)


class TriangleAttention(Triangle):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TriangleAttention() for _ in range(3))
        self.pool = nn.MultiheadAttention(DIM, 2)

    def forward(self, x, biases):
        for block in self.blocks:
            x = x + block(x, biases)
        return x


def call(dtype: torch.dtype = torch.float32):
    (x, _, biases), _ = foreign.folding("openfold")
    return x.to(dtype), [b.to(dtype) for b in biases]


@pytest.fixture
def operator_calls(monkeypatch):
    """Counts calls of the operator by the OpenFold-like adapters."""
    from torch_gated_attn.integrations import openfold

    calls = []
    monkeypatch.setattr(openfold, "gated_attention", lambda *a, **k: calls.append(a) or gated_attention(*a, **k))
    return calls


def test_report_and_dry_run(operator_calls):
    model = Model()
    report = patch(model, dry_run=True)
    assert [m.path for m in report.replaced] == ["blocks.0.mha", "blocks.1.mha", "blocks.2.mha"]
    assert [(m.path, m.note) for m in report.left] == [("pool", "no adapter for this class")]
    assert str(report) == (
        "torch_gated_attn: 3 attention modules would be replaced, 1 left\n"
        "  would be replaced\n"
        "    3 x foreign.OpenFold.Attention at blocks.*.mha: OpenFold Attention\n"
        "  left\n"
        "    1 x torch.nn.modules.activation.MultiheadAttention at pool: no adapter for this class"
    )
    model(*call())
    assert not operator_calls
    done = patch(model)
    assert not done.dry_run
    assert done.replaced == report.replaced
    model(*call())
    assert len(operator_calls) == 3
    again = patch(model)
    assert not again.replaced
    assert {m.note for m in again.left} == {"already replaced", "no adapter for this class"}


def test_weights_hooks_and_types_stay(operator_calls):
    model = Model()
    state, parameters = model.state_dict(), list(model.parameters())
    seen = []
    for module in (model.blocks[1].mha, model.blocks[1].mha.linear_v):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    expected = model(*call()).detach()
    seen.clear()
    torch.manual_seed(0)
    patch(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert isinstance(model.blocks[0].mha, OpenFold.Attention)
    assert type(model.blocks[0].mha) is type(model.blocks[1].mha)
    assert "attention=torch_gated_attn" in repr(model)
    torch.manual_seed(0)
    model(*call())
    assert seen == ["Linear", "Attention"]
    assert expected.shape == (2, foreign.ROWS, LENGTH, DIM)


def test_unpatch_gives_the_classes_back(operator_calls):
    model = Model()
    before = [type(m) for m in model.modules()]
    x, biases = call()
    expected = model(x, biases)
    patch(model)
    assert not torch.equal(model(x, biases), expected), "both paths round alike: this test could not fail"
    assert unpatch(model) == 3
    assert [type(m) for m in model.modules()] == before
    assert torch.equal(model(x, biases), expected)
    assert unpatch(model) == 0


def test_context_manager_undoes_only_its_own():
    model = Model()
    patch(model.blocks[0])
    with contextlib.suppress(KeyError), patched(model) as report:
        raise KeyError
    assert [m.path for m in report.replaced] == ["blocks.1.mha", "blocks.2.mha"]
    assert unpatch(model) == 1


def test_the_model_itself_can_be_an_attention():
    attention = OpenFold.Attention()
    report = patch(attention)
    assert str(report).endswith("1 x foreign.OpenFold.Attention at (the model itself): OpenFold Attention")
    assert unpatch(attention) == 1


def test_copies_are_replaced_too(operator_calls):
    model = Model()
    patch(model)
    x, biases = call()
    expected = model(x, biases)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    for other in copies:
        operator_calls.clear()
        assert torch.equal(other(x, biases), expected)
        assert len(operator_calls) == 3
        assert unpatch(other) == 3
        assert all(a is not b for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert unpatch(model) == 3


class OtherFlags(OpenFold.Attention):
    pass


def make_unknown_flag() -> nn.Module:
    class Attention(foreign.Projections):
        def forward(self, q_x, kv_x, biases=None, drop_heads=False):
            return q_x

    return Attention()


def make_other_preparation() -> nn.Module:
    class Attention(OpenFold.Attention):
        def _prep_qkv(self, q_x, kv_x):
            return q_x, kv_x, kv_x

    return Attention()


def make_without(name: str) -> nn.Module:
    module = OpenFold.Attention()
    delattr(module, name)
    return module


def make_with_own_forward() -> nn.Module:
    module = OpenFold.Attention()
    module.forward = lambda *args: args[0]
    return module


def make_with_hook_inside() -> nn.Module:
    module = OpenFold.Attention()
    module.sigmoid.register_forward_hook(lambda *_: None)
    return module


def make_windowed(change: str) -> nn.Module:
    module = AlphaFold3Pytorch.TriangleAttention()
    if change == "hooks":
        module.attn.register_forward_hook(lambda *_: None)
    elif change == "windows":
        module.attn.attend.is_local_attn = True
    else:
        module.attn.to_gates = nn.Sequential(nn.Linear(DIM, DIM))
    return module


def make_other_gate() -> nn.Module:
    module = Foundry.AttentionPairBiasDiffusion()
    module.to_g = module.to_g[0]
    return module


LEFT = {
    "local windows are another formula": lambda: make_windowed("windows").attn,
    "to_g is not a projection and a sigmoid": make_other_gate,
    "its forward has parameters that are not understood: drop_heads": make_unknown_flag,
    "a subclass overrides _prep_qkv": make_other_preparation,
    "it has no c_hidden": lambda: make_without("c_hidden"),
    "its forward was replaced on the instance": make_with_own_forward,
    "sigmoid has hooks, which would not run": make_with_hook_inside,
    "the masks of config._attn_implementation 'flash_attention_2' are not understood": (
        lambda: Qwen3NextAttention("flash_attention_2")
    ),
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("hooks", "attn has hooks, which would not run"),
        ("windows", "local windows are another formula"),
        ("gate", "to_gates is not a projection and a sigmoid"),
    ],
)
def test_a_triangle_attention_whose_inside_is_another_is_left(change, why):
    report = patch(make_windowed(change))
    assert next(m.note for m in report.left if m.path == "") == why


@pytest.mark.parametrize("why", LEFT)
def test_what_is_not_understood_is_left_with_the_reason(why):
    module = LEFT[why]()
    before = type(module)
    report = patch(module)
    assert [m.note for m in report.left] == [why]
    assert type(module) is before


def test_a_subclass_that_changes_nothing_is_understood():
    assert len(patch(OtherFlags()).replaced) == 1


def fallback(module: nn.Module, *args, **kwargs) -> bool:
    """Whether a replaced module's call is the original's, bit for bit, while a plain call is not."""
    expected = module(*args, **kwargs)
    with patched(module) as report:
        assert len(report.replaced) == 1
        result = module(*args, **kwargs)
    first = [x[0] if isinstance(x, tuple) else x for x in (expected, result)]
    return torch.equal(*first)


def test_calls_that_are_not_understood_take_the_original():
    x, (mask_bias, pair) = call()
    attention = OpenFold.Attention()
    assert not fallback(attention, x, x, [mask_bias, pair])
    assert not fallback(attention, x, x, [mask_bias, pair], use_lma=True)
    assert fallback(attention, x, x, [mask_bias, pair], use_flash=True)
    assert fallback(attention, x, x, [mask_bias, pair], False, True)  # flags without names
    assert fallback(attention, x, x[:1], [mask_bias, pair])  # batch dimensions that broadcast

    (x, kv), kwargs = foreign.protenix_call()
    x, kv, bias = x.float(), kv.float(), kwargs["attn_bias"].float()
    assert not fallback(Protenix.Attention(biases=False), x, kv, bias)
    assert fallback(Protenix.Attention(biases=False), x, kv, bias, n_queries=4, n_keys=8)

    (x,), kwargs = foreign.esm_self()
    x, bias, mask = x.float(), kwargs["bias"].float(), kwargs["mask"]
    assert not fallback(EsmFoldSelfAttention(), x, mask, bias)

    (s, z, mask), kwargs = foreign.diffusion(1)
    pair_bias = foreign.Boltz1.AttentionPairBias()
    assert not fallback(pair_bias, s.float(), z.float(), mask.float(), **kwargs)
    assert not fallback(pair_bias, s.float(), z.float(), mask.float() * 0.5, **kwargs)  # not a mask, but a bias

    (a, s, z, _), _ = foreign_alphafold3.tokens(True)
    a, s, z = a.float(), s.float(), z.float()
    diffusion = Foundry.AttentionPairBiasDiffusion()
    assert not fallback(diffusion, a, s, z, None)
    assert fallback(diffusion, a, s, z, z[..., 0])  # local windows

    attention = AlphaFold3Pytorch.Attention()
    pair = torch.randn(2, foreign.HEADS, LENGTH, LENGTH)
    assert not fallback(attention, a, attn_bias=pair, context=s)
    assert not fallback(attention, a, attn_bias=pair, return_values=True)
    assert fallback(attention, a, attn_bias=pair, value_residual=pair)
    attention.attend.attn_dropout.p = 1.0
    assert fallback(attention, a, attn_bias=pair)
    assert not fallback(attention.eval(), a, attn_bias=pair)

    decoder = Qwen3NextAttention().float()
    (x, positions), _ = foreign.decoder(None)
    x, positions = x.float(), tuple(p.float() for p in positions)
    assert not fallback(decoder, x, positions)
    assert fallback(decoder, x, positions, output_attentions=True)
    decoder.attention_dropout = 0.1
    assert fallback(decoder, x, positions)
    assert not fallback(decoder.eval(), x, positions)


def test_what_counts_as_a_mask():
    mask_bias = torch.tensor([0.0, -1e9, 0.0, -torch.inf, torch.finfo(torch.float32).min])
    visible = [True, False, True, False, False]
    pair = torch.randn(2, 3, 4, 5)
    for shape in ((5,), (1, 5), (1, 1, 5), (1, 1, 1, 5)):
        mask, bias = _biases.merge([mask_bias.view(shape), pair], (3, 4), torch.float32)
        assert mask.flatten().tolist() == visible
        assert bias is pair
    for other in (mask_bias + 0.5, mask_bias.clone().requires_grad_(), mask_bias.expand(4, 5), mask_bias.expand(3, 1, 5)):
        mask, bias = _biases.merge([other, pair], (3, 4), torch.float32)
        assert mask is None
        torch.testing.assert_close(bias, other + pair)
    # Only the first, and only where its shape tells it from a pair bias.
    assert _biases.merge([pair, mask_bias], (3, 4), torch.float32)[0] is None
    assert _biases.merge([mask_bias], (1, 1), torch.float32) == (None, mask_bias)
    assert _biases.merge([], (3, 4), torch.float32) == (None, None)
    assert _biases.merge([pair.double()], (3, 4), torch.bfloat16)[1].dtype == torch.bfloat16


def test_padded_rows_are_finite_with_finite_gradients():
    """A row of the pair representation that is padding attends to nothing. The originals give the mean of the values (in
    float32), or NaN where they mask by -inf; replaced, it is the mean everywhere."""
    (x, _, (mask_bias, pair)), _ = foreign.folding("openfold")
    mask_bias[0, 2] = -1e9
    attention = OpenFold.Attention()
    x, biases = x.float().requires_grad_(), [mask_bias.float(), pair.float()]
    expected = attention(x, x, biases)
    patch(attention)
    result = attention(x, x, biases)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    result.square().sum().backward()
    assert x.grad.isfinite().all()

    (x,), kwargs = foreign.esm_self()
    kwargs["mask"][0] = False
    attention = EsmFoldSelfAttention().double()
    assert attention(x, **kwargs)[0][0].isnan().all()
    patch(attention)
    assert attention(x, **kwargs)[0].isfinite().all()


def test_boltz_windows_and_cache():
    """Keys taken from other positions than the queries, and a pair bias that is projected once."""
    (s, z, mask), kwargs = foreign.diffusion(1)
    mask[:, :4] = 1
    attention = foreign.Boltz1.AttentionPairBias().double()
    replaced = copy.deepcopy(attention)
    patch(replaced)
    caches = {}, {}
    for call_number in range(2):
        results = [
            module(s, z[:, :, 2:] * (1 - call_number), mask, to_keys=lambda x: x[:, 2:], model_cache=cache, **kwargs)
            for module, cache in zip((attention, replaced), caches, strict=True)
        ]
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)  # its mask is float32
    assert torch.equal(caches[0]["z"], caches[1]["z"])
    one_mask = torch.ones(1, LENGTH).double()  # shared by all samples
    torch.testing.assert_close(replaced(s, z, one_mask, **kwargs), attention(s, z, one_mask, **kwargs))


def test_high_precision_is_float32(operator_calls):
    class Attention(foreign.Projections):
        def forward(self, q_x, kv_x, biases=None, use_high_precision=False):
            return self.attend(q_x, kv_x, biases)

    x, biases = call(torch.bfloat16)
    attention = Attention().bfloat16()
    patch(attention)
    low, high = attention(x, x, biases), attention(x, x, biases, use_high_precision=True)
    assert [query.dtype for query, *_ in operator_calls] == [torch.bfloat16, torch.float32]
    assert high.dtype == torch.bfloat16
    torch.testing.assert_close(high, low, rtol=0, atol=torch.finfo(torch.bfloat16).eps * low.abs().max().item())


def test_training_step_of_a_replaced_model():
    model = Model()
    patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.blocks.parameters()]
    x, biases = call()
    for step in range(2):
        model.train(step == 0)
        optimizer.zero_grad()
        model(x, biases).square().mean().backward()
        optimizer.step()
    for old, new in zip(before, model.blocks.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_compiled():
    torch._dynamo.reset()
    attention = OpenFold.Attention()
    x, biases = call()
    patch(attention)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, biases), attention(x, x, biases))


def test_a_device_without_kernels_is_left(monkeypatch):
    class Elsewhere(Boltz.Attention):
        def parameters(self, recurse=True):
            return iter([SimpleNamespace(device=torch.device(device))])

    monkeypatch.setattr(_patch, "_C", SimpleNamespace(cuda_version=None))
    for device in ("cuda", "xpu"):
        assert [m.note for m in patch(Elsewhere()).left] == [f"this build has no kernels for its device, {device}"]
    monkeypatch.setattr(_patch, "_C", SimpleNamespace(cuda_version="13.0"))
    device = "cuda"
    assert len(patch(Elsewhere()).replaced) == 1
