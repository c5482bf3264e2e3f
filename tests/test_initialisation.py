# SPDX-License-Identifier: BSD-3-Clause
"""A submodule that is reset by itself, as after construction on the meta device or by FSDP, starts as AlphaFold's does."""

from __future__ import annotations

import copy
import pickle

import modules
import pytest
import torch
from torch import Tensor, nn

from torch_gated_attn import GatedAttention
from torch_gated_attn.alphafold import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    TriangleAttention,
)

A, H, P = 96, 4, 128  # wide enough that a limit shows in the extremes
D = A // H


def glorot(heads_in: int, size_in: int, size_out: int) -> tuple[str, float]:
    """Haiku multiplies both fans by all leading dimensions of the weight."""
    return "uniform", (6 / (heads_in * (size_in + size_out))) ** 0.5


# What AlphaFold's code says of each parameter: uniform within a limit, normal with a deviation, or constant.
PROJECTION = glorot(A, H, D)
ATTENTION = {
    "linear_q.weight": PROJECTION,
    "linear_k.weight": PROJECTION,
    "linear_v.weight": PROJECTION,
    "linear_g.weight": ("constant", 0.0),
    "linear_g.bias": ("constant", 1.0),
    "linear_o.weight": ("constant", 0.0),
    "linear_o.bias": ("constant", 0.0),
}
INNER = {f"attention.{name}": start for name, start in ATTENTION.items()}
NORM = {"query_norm.weight": ("constant", 1.0), "query_norm.bias": ("constant", 0.0)}
PAIR_NORM = {"pair_norm.weight": ("constant", 1.0), "pair_norm.bias": ("constant", 0.0)}
CASES = {
    "attention": (lambda **o: GatedAttention(A, H, **o), ATTENTION),
    "attention, not zero": (
        lambda **o: GatedAttention(A, H, kv_dim=P, q_bias=True, zero_init=False, **o),
        {
            **ATTENTION,
            "linear_q.bias": ("constant", 0.0),
            "linear_k.weight": glorot(P, H, D),
            "linear_v.weight": glorot(P, H, P // H),
            "linear_o.weight": glorot(H, P // H, A),
        },
    ),
    "attention, no bias": (
        lambda **o: GatedAttention(A, H, gating=False, output_bias=False, **o),
        {
            name: start
            for name, start in ATTENTION.items()
            if name not in ("linear_g.weight", "linear_g.bias", "linear_o.bias")
        },
    ),
    "row": (
        lambda **o: MSARowAttentionWithPairBias(A, P, H, **o),
        {**INNER, **NORM, **PAIR_NORM, "pair_bias.weight": ("normal", P**-0.5)},
    ),
    "column": (lambda **o: MSAColumnAttention(A, H, **o), {**INNER, **NORM}),
    "global": (
        lambda **o: MSAColumnGlobalAttention(A, H, **o),
        {**ATTENTION, **NORM, "linear_k.weight": glorot(1, A, D), "linear_v.weight": glorot(1, A, D)},
    ),
    "triangle": (lambda **o: TriangleAttention(A, H, **o), {**INNER, **NORM, "pair_bias.weight": ("normal", A**-0.5)}),
}


def starts_as(parameter: Tensor, kind: str, size: float) -> str | None:
    """What is wrong, None if the values look like the distribution."""
    if kind == "constant":
        return None if (parameter == size).all() else f"is not {size} everywhere"
    deviation = size / 3**0.5 if kind == "uniform" else size
    if abs(parameter.std().item() / deviation - 1) > 0.1:
        return f"has deviation {parameter.std().item():.4f}, not {deviation:.4f}"
    largest = parameter.abs().max().item()
    if kind == "uniform" and not 0.95 * size < largest <= size:
        return f"reaches {largest:.4f}, not {size:.4f}"
    return "looks uniform" if kind == "normal" and largest < 2.2 * size else None


def wrong(module: nn.Module, expected: dict[str, tuple[str, float]]) -> list[str]:
    parameters = dict(module.named_parameters())
    assert parameters.keys() == expected.keys()
    found = {name: starts_as(parameters[name].detach(), *start) for name, start in expected.items()}
    return [f"{name} {what}" for name, what in found.items() if what]


@pytest.mark.parametrize("case", CASES)
def test_construction(case):
    build, expected = CASES[case]
    assert wrong(build(), expected) == []


@pytest.mark.parametrize("backwards", [False, True], ids=["outer first", "inner first"])
@pytest.mark.parametrize("case", CASES)
def test_every_submodule_resets_itself(case, backwards):
    build, expected = CASES[case]
    module = build(device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    found = [part for part in module.modules() if hasattr(part, "reset_parameters")]
    for part in reversed(found) if backwards else found:
        part.reset_parameters()
    assert wrong(module, expected) == []


@pytest.mark.parametrize("case", CASES)
def test_only_the_owners_of_parameters_are_reset(case):
    """As FSDP does: `to_empty` and `reset_parameters` of the modules that hold parameters themselves."""
    build, expected = CASES[case]
    module = build(device="meta")
    for part in module.modules():
        if list(part.parameters(recurse=False)):
            part.to_empty(device="cpu", recurse=False)
            for parameter in part.parameters(recurse=False):
                nn.init.constant_(parameter, 7.0)
            part.reset_parameters()
    assert wrong(module, expected) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_resets_itself_and_not_the_original(copied):
    build, expected = CASES["attention, not zero"]
    module = build()
    other = copied(module)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for parameter in other.parameters():
        nn.init.constant_(parameter, 7.0)
    for part in other.children():
        part.reset_parameters()
    assert wrong(other, expected) == []
    for parameter, value in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_every_module_is_among_these():
    built = {type(build()) for build, _ in CASES.values()}
    assert built == {type(modules.make(name)) for name in modules.MODULES}


@pytest.mark.parametrize("name", modules.MODULES)
def test_projections_are_linear_layers(name):
    """Tensor parallel styles, adapters and quantisers ask `isinstance`; the text of a model is read."""
    module = modules.make(name)
    layers = {path: layer for path, layer in module.named_modules() if "linear_" in path or "pair_bias" in path}
    assert layers
    for path, layer in layers.items():
        assert isinstance(layer, nn.Linear), path
        assert repr(layer) == (
            f"Linear(in_features={layer.in_features}, out_features={layer.out_features}, bias={layer.bias is not None})"
        )
        assert set(layer.state_dict()) <= {"weight", "bias"}
