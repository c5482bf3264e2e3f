# SPDX-License-Identifier: BSD-3-Clause
"""The T5 family of transformers with the operator: loss and every gradient against the stock model's, by the rule of
test_integrations with tolerance.py's factors, tiny and with random weights.

`pytest -s` prints the ratios, the release of transformers, and the time of a training step.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from test_integrations import ROUNDINGS
from torch import Tensor, nn

from torch_gated_attn.integrations.functions import register_transformers

transformers = pytest.importorskip("transformers")

QUERIES, KEYS, VOCABULARY, WIDTH = 6, 11, 60, 32

# Beside T5's own: what makes the model small, and the inputs that it takes.
FAMILY: dict[str, dict[str, Any]] = {
    "T5": {},
    "MT5": {},
    "UMT5": {},
    "LongT5": {"local_radius": 4},
    "Pop2Piano": {},
    "SwitchTransformers": {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "Udop": {"image_size": 16, "patch_size": 8, "relative_attention_num_buckets": 32},
}


def build(name: str) -> nn.Module:
    options = {"relative_attention_num_buckets": 8, **FAMILY[name]}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        **options,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.size(-1) ** -0.5 if parameter.dim() > 1 else 1.0)
    return model.eval()  # no jitter in the routers


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(2, KEYS, dtype=torch.long)
    mask[1, KEYS - 4 :] = 0
    given = {"attention_mask": mask, "labels": torch.randint(1, VOCABULARY, (2, QUERIES), generator=generator)}
    if name == "Pop2Piano":
        given["inputs_embeds"] = torch.randn(2, KEYS, WIDTH, generator=generator)
    else:
        given["input_ids"] = torch.randint(1, VOCABULARY, (2, KEYS), generator=generator)
    if name == "Udop":
        given["bbox"] = torch.full((2, KEYS, 4), 0.25)
    return given


def loss_and_gradients(model: nn.Module, implementation: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.set_attn_implementation(implementation)
    dtype = next(model.parameters()).dtype
    loss = model(**{k: x.to(dtype) if x.is_floating_point() else x for k, x in given.items()}).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {"loss": loss.detach(), **{n: g for n, g in zip(names, grads, strict=True) if g is not None}}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast at this size, and steady where cores are shared
    yield
    torch.set_num_threads(threads)


# In bfloat16 rounding decides which expert of SwitchTransformers a token takes.
CASES = [(name, dtype) for name in FAMILY for dtype in (torch.float32, torch.bfloat16)]
CASES.remove(("SwitchTransformers", torch.bfloat16))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_loss_and_gradients(name, dtype):
    register_transformers()
    model, given = build(name).to(dtype), inputs(name)
    gold = loss_and_gradients(copy.deepcopy(model).double(), "eager", given)
    stock, ours = (loss_and_gradients(model, i, given) for i in ("eager", "torch_gated_attn"))
    assert gold.keys() == stock.keys() == ours.keys()
    assert any("relative_attention_bias" in key for key in gold)
    largest, ratios = max(x.abs().max().item() for x in gold.values()), []
    for key, true in gold.items():
        error, allowed = ((x[key].double() - true).abs().max().item() for x in (ours, stock))
        size = true.abs().max().item()
        unit = torch.finfo(dtype).eps * (size if size > 1e-9 * largest else largest)
        factor = 2 if key == "loss" else 3
        assert error <= factor * allowed + ROUNDINGS * unit, f"{key}: {error:.3g} against {allowed:.3g}"
        ratios.append(error / max(allowed, unit))
    print(
        f"\n{name} of transformers {transformers.__version__}, {dtype}: at most {max(ratios):.2f} of stock's error", end=""
    )


def test_generates_the_same_and_trains():
    """Decoding with a cache, where the position bias has one row, and the time of a training step."""
    register_transformers()
    model, given = build("T5"), inputs("T5")
    tokens, seconds = {}, {}
    for implementation in ("eager", "sdpa", "torch_gated_attn"):
        model.set_attn_implementation(implementation)
        source = {k: given[k] for k in ("input_ids", "attention_mask")}
        tokens[implementation] = model.generate(**source, max_new_tokens=5, do_sample=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(3):
            start = time.perf_counter()
            optimizer.zero_grad()
            model(**given).loss.backward()
            optimizer.step()
            seconds[implementation] = time.perf_counter() - start
    assert torch.equal(tokens["torch_gated_attn"], tokens["eager"])
    assert all(p.grad is not None for n, p in model.named_parameters() if "relative_attention_bias" in n)
    steps = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in seconds.items())
    print(f"\nT5 of transformers {transformers.__version__}, a training step: {steps}", end="")
