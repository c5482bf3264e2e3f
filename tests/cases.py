# SPDX-License-Identifier: BSD-3-Clause
"""One case for every interface that `integrations.patch` knows: the modules written for the tests, and the packages' own
where they are installed.

A case makes a module and a call of it: `make()` and `arguments()`, in float64 and at random. Every row attends to a key.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from foreign import (
    DIM,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LENGTH,
    Boltz,
    Boltz1,
    Boltz2,
    EsmFoldAttention,
    EsmFoldSelfAttention,
    OpenFold,
    Protenix,
    Qwen3NextAttention,
    decoder,
    diffusion,
    esm_self,
    folding,
    padding,
    protenix_call,
)
from foreign_alphafold3 import AlphaFold3Pytorch, Foundry, alphafold3, square, tokens
from torch import nn


@dataclass
class Case:
    make: Callable[[], nn.Module]
    arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def installed(module: str, name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """Makes an instance of a package's own class; the test is skipped where the package is missing."""

    def make() -> nn.Module:
        os.environ.setdefault("LAYERNORM_TYPE", "torch")  # Protenix compiles a CUDA extension otherwise
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module}: {error}")
        made = getattr(found, name)(*args, **kwargs)
        if hasattr(made, "force_bfloat16"):  # Foundry's: the other dtypes are to be compared too
            made.force_bfloat16 = False
        return made.double()

    return make


def release(cls: type) -> str:
    """The distribution of a class and its version, as installed."""
    package = cls.__module__.partition(".")[0]
    names = importlib.metadata.packages_distributions().get(package, [package])
    return f"{names[0]} {importlib.metadata.version(names[0])}"


def qwen(package: str, name: str, config_name: str, implementation: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("transformers.models")
        model = importlib.import_module(f"{models.__name__}.{package}.modeling_{package}")
        config = getattr(importlib.import_module(f"{models.__name__}.{package}.configuration_{package}"), config_name)(
            hidden_size=DIM, num_attention_heads=4, num_key_value_heads=2, head_dim=16
        )
        config._attn_implementation = implementation
        return getattr(model, name)(config, layer_idx=0).double()

    return make


_SAME = (DIM, DIM, DIM, HEAD_DIM, HEADS)

WRITTEN = {
    "OpenFold": Case(OpenFold.Attention, lambda: folding("openfold")),
    "OpenFold without gate": Case(lambda: OpenFold.Attention(gating=False), lambda: folding("openfold")),
    "Boltz triangular": Case(lambda: Boltz.Attention(biases=False), lambda: folding("boltz")),
    "Boltz-1 pair bias": Case(Boltz1.AttentionPairBias, lambda: diffusion(1)),
    "Boltz-2 pair bias": Case(Boltz2.AttentionPairBias, lambda: diffusion(2)),
    "Protenix": Case(lambda: Protenix.Attention(biases=False), protenix_call),
    "EsmFoldAttention": Case(EsmFoldAttention, lambda: folding("esmfold")),
    "EsmFoldSelfAttention": Case(EsmFoldSelfAttention, esm_self),
    "Foundry triangle, starting": Case(Foundry.TriangleAttention, square),
    "Foundry triangle, ending": Case(lambda: Foundry.TriangleAttention(start_node=False), square),
    "Foundry pairformer": Case(Foundry.AttentionPairBiasPairformerDeepspeed, lambda: tokens(False)),
    "Foundry diffusion": Case(Foundry.AttentionPairBiasDiffusion, lambda: tokens(True)),
    "Foundry diffusion without norms": Case(lambda: Foundry.AttentionPairBiasDiffusion(False), lambda: tokens(True)),
    "alphafold3-pytorch Attention": Case(AlphaFold3Pytorch.Attention, alphafold3),
    "alphafold3-pytorch triangle": Case(AlphaFold3Pytorch.TriangleAttention, lambda: square(padding(2, LENGTH).bool())),
    "alphafold3-pytorch triangle, ending": Case(lambda: AlphaFold3Pytorch.TriangleAttention(True), square),
    "Qwen3NextAttention": Case(Qwen3NextAttention, lambda: decoder(None)),
    "Qwen3NextAttention, mask": Case(Qwen3NextAttention, lambda: decoder("boolean")),
    "Qwen3NextAttention, eager": Case(lambda: Qwen3NextAttention("eager"), lambda: decoder("additive")),
}

_PAIRFORMER = "AttentionPairBiasPairformerDeepspeed"
_ESM = "transformers.models.esm.modeling_esmfold"
_QWEN3_NEXT = ("qwen3_next", "Qwen3NextAttention", "Qwen3NextConfig")

INSTALLED = {
    "openfold3 Attention": Case(
        installed("openfold3.core.model.primitives.attention", "Attention", *_SAME), lambda: folding("openfold")
    ),
    "openfold Attention": Case(installed("openfold.model.primitives", "Attention", *_SAME), lambda: folding("openfold")),
    "intellifold Attention": Case(
        installed("intellifold.openfold.model.primitives", "Attention", *_SAME), lambda: folding("openfold")
    ),
    "rf3 TriangleAttention, starting": Case(
        installed("rf3.model.layers.attention", "TriangleAttention", DIM, HEADS, HEAD_DIM), square
    ),
    "rf3 TriangleAttention, ending": Case(
        installed("rf3.model.layers.attention", "TriangleAttention", DIM, HEADS, HEAD_DIM, start_node=False), square
    ),
    "rf3 pairformer": Case(
        installed("rf3.model.layers.pairformer_layers", _PAIRFORMER, DIM, None, DIM, 2), lambda: tokens(False)
    ),
    "rfd3 pairformer": Case(
        installed("rfd3.model.layers.pairformer_layers", _PAIRFORMER, DIM, None, DIM, 2), lambda: tokens(False)
    ),
    "rf3 diffusion": Case(
        installed("rf3.model.layers.af3_diffusion_transformer", "AttentionPairBiasDiffusion", DIM, DIM, DIM, 2, True),
        lambda: tokens(True),
    ),
    "alphafold3-pytorch Attention": Case(
        installed("alphafold3_pytorch.attention", "Attention", dim=DIM, dim_head=HEAD_DIM, heads=HEADS), alphafold3
    ),
    "alphafold3-pytorch TriangleAttention": Case(
        installed(
            "alphafold3_pytorch.alphafold3",
            "TriangleAttention",
            dim=DIM,
            dim_head=HEAD_DIM,
            heads=HEADS,
            node_type="ending",
        ),
        lambda: square(padding(2, LENGTH).bool()),
    ),
    "boltz Attention": Case(
        installed("boltz.model.layers.triangular_attention.primitives", "Attention", *_SAME), lambda: folding("boltz")
    ),
    "boltz AttentionPairBias (1)": Case(
        installed("boltz.model.layers.attention", "AttentionPairBias", HIDDEN, DIM, HEADS), lambda: diffusion(1)
    ),
    "boltz AttentionPairBias (2)": Case(
        installed("boltz.model.layers.attentionv2", "AttentionPairBias", HIDDEN, DIM, HEADS), lambda: diffusion(2)
    ),
    "protenix Attention": Case(
        installed("protenix.model.modules.primitives", "Attention", *_SAME, use_efficient_implementation=False),
        protenix_call,
    ),
    "protenix triangular Attention": Case(
        installed("protenix.model.triangular.layers", "Attention", *_SAME), lambda: folding("openfold")
    ),
    "transformers EsmFoldAttention": Case(installed(_ESM, "EsmFoldAttention", *_SAME), lambda: folding("esmfold")),
    "transformers EsmFoldSelfAttention": Case(
        installed(_ESM, "EsmFoldSelfAttention", HIDDEN, HEADS, HEAD_DIM, gated=True), esm_self
    ),
    "transformers Qwen3NextAttention": Case(qwen(*_QWEN3_NEXT, "sdpa"), lambda: decoder(None)),
    "transformers Qwen3NextAttention, mask": Case(qwen(*_QWEN3_NEXT, "sdpa"), lambda: decoder("boolean")),
    "transformers Qwen3NextAttention, eager": Case(qwen(*_QWEN3_NEXT, "eager"), lambda: decoder("additive")),
    "transformers Qwen3_5Attention": Case(
        qwen("qwen3_5", "Qwen3_5Attention", "Qwen3_5TextConfig", "sdpa"), lambda: decoder("boolean")
    ),
}
