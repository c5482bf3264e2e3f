# SPDX-License-Identifier: BSD-3-Clause
"""`from_alphafold` of every module takes whatever holds the numbers, and names the array that does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from torch_gated_attn import GatedAttention, alphafold

A, H, D, P, SCOPE = 12, 4, 3, 10, "stack/part"
PER_HEAD = dict.fromkeys(("query_w", "key_w", "value_w", "gating_w"), (A, H, D))
ATTENTION = {**PER_HEAD, "gating_b": (H, D), "output_w": (H, D, A), "output_b": (A,)}
INNER = {f"attention//{name}": shape for name, shape in ATTENTION.items()}
NORM = {"query_norm//scale": (A,), "query_norm//offset": (A,)}
PAIR_NORM = {"feat_2d_norm//scale": (P,), "feat_2d_norm//offset": (P,)}
GLOBAL = {**INNER, "attention//key_w": (A, D), "attention//value_w": (A, D)}

# Where the arrays stand in `params`, their shapes, and the call.
MODULES: dict[str, tuple[str, dict[str, tuple[int, ...]], Callable[[Any], torch.nn.Module]]] = {
    "attention": ("", ATTENTION, GatedAttention.from_alphafold),
    "row": (
        f"{SCOPE}/",
        {**INNER, **NORM, **PAIR_NORM, "/feat_2d_weights": (P, H)},
        lambda params: alphafold.MSARowAttentionWithPairBias.from_alphafold(params, SCOPE),
    ),
    "column": (f"{SCOPE}/", {**INNER, **NORM}, lambda params: alphafold.MSAColumnAttention.from_alphafold(params, SCOPE)),
    "global": (
        f"{SCOPE}/",
        {**GLOBAL, **NORM},
        lambda params: alphafold.MSAColumnGlobalAttention.from_alphafold(params, SCOPE),
    ),
    "triangle": (
        f"{SCOPE}_starting_node/",
        {**INNER, **NORM, "/feat_2d_weights": (A, H)},
        lambda params: alphafold.TriangleAttention.from_alphafold(params, f"{SCOPE}_starting_node"),
    ),
}


def arrays(name: str, convert: Callable[[np.ndarray], Any] = lambda x: x) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    prefix, shapes, _ = MODULES[name]
    return {prefix + array: convert(rng.standard_normal(shape)) for array, shape in shapes.items()}


def state(name: str, params: dict[str, Any]) -> dict[str, torch.Tensor]:
    return MODULES[name][2](params).state_dict()


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.astype("f4")
    x.setflags(write=False)
    return x


KINDS = {
    "big-endian float64": (lambda x: x.astype(">f8"), torch.float64),
    "big-endian float32": (lambda x: x.astype(">f4"), torch.float32),
    "big-endian float16": (lambda x: x.astype(">f2"), torch.float16),
    "bfloat16 of ml_dtypes": (lambda x: x.astype(ml_dtypes.bfloat16), torch.bfloat16),
    "every other number, backwards": (lambda x: np.repeat(x, 2, axis=-1)[..., ::2][::-1], torch.float64),
    "read-only": (read_only, torch.float32),
    "lists": (lambda x: x.tolist(), torch.float64),
    "tensors": (lambda x: torch.tensor(x, dtype=torch.bfloat16), torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODULES)
def test_values_and_dtype(name, kind):
    convert, dtype = KINDS[kind]
    params = arrays(name, convert)
    numbers = {key: x.double().numpy() if torch.is_tensor(x) else x for key, x in params.items()}
    plain = {key: torch.from_numpy(np.array(x, dtype="f8", order="C")) for key, x in numbers.items()}
    loaded, expected = state(name, params), state(name, plain)
    assert {x.dtype for x in loaded.values()} == {dtype}
    for parameter, value in expected.items():
        assert torch.equal(loaded[parameter].double(), value), parameter


REFUSED = {
    "whole numbers": (lambda x: x.astype("i8"), "is int64"),
    "complex numbers": (lambda x: x.astype("c16"), "is complex128"),
    "text": (lambda x: x.astype("U4"), "is <U4"),
    "objects": (lambda x: x.astype(object), "is object"),
    "two bytes without a type": (lambda x: x.astype("f2").view("V2"), "is |V2"),  # bfloat16 that numpy.load gives back
    "8 bits": (lambda x: x.astype(ml_dtypes.float8_e4m3fn), "is float8_e4m3fn"),
    "a tensor of 8 bits": (lambda x: torch.tensor(x).to(torch.float8_e4m3fn), "is float8_e4m3fn"),
    "a tensor of whole numbers": (lambda x: torch.tensor(x).long(), "is int64"),
    "lists of unequal lengths": (lambda x: [[1.0, 2.0], [3.0]], "is a list"),
    "nothing": (lambda x: None, "is object"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", MODULES)
def test_what_is_no_array_of_floats_is_refused_by_name(name, kind):
    convert, what = REFUSED[kind]
    params = arrays(name)
    for wrong in params:
        array = wrong.removeprefix(MODULES[name][0])
        with pytest.raises(TypeError) as raised:
            state(name, {**params, wrong: convert(params[wrong])})
        assert str(raised.value) == f"{array} must be an array of float64, float32, bfloat16 or float16, but {what}"


@pytest.mark.parametrize("name", MODULES)
def test_an_array_that_is_missing_or_does_not_fit_is_named(name):
    params, (prefix, shapes, _) = arrays(name), MODULES[name]
    for wrong, array in params.items():
        short, rank = wrong.removeprefix(prefix), array.ndim
        if "gating" not in short or name == "global":
            with pytest.raises(ValueError, match=re.escape(short.removeprefix("attention//"))):
                state(name, {key: x for key, x in params.items() if key != wrong})
        with pytest.raises(ValueError, match=rf"^{short} must have {rank} dimensions?, but has shape \["):
            state(name, {**params, wrong: array[None]})
        if short not in ("query_w", "attention//query_w"):  # the sizes of the first are believed
            with pytest.raises(ValueError, match=r"must have shape \[.*\] to fit the other arrays, but has shape \["):
                state(name, {**params, wrong: np.repeat(array, 2, axis=0)})
    assert set(params) == {prefix + array for array in shapes}


def test_heads_that_do_not_add_up_to_the_width():
    """Attention over heads of any size is built as its arrays say; global attention has no such sizes."""
    for name, rank in (("column", 3), ("global", 2)):
        params = arrays(name)
        for array in ("query_w", "key_w", "value_w", "gating_w", "gating_b"):
            params[f"{SCOPE}/attention//{array}"] = params[f"{SCOPE}/attention//{array}"][..., :2]
        output = params[f"{SCOPE}/attention//output_w"]
        assert params[f"{SCOPE}/attention//key_w"].ndim == rank
        params[f"{SCOPE}/attention//output_w"] = output[:, :2]
        if name == "column":
            assert state(name, params)["attention.linear_q.weight"].shape == (2 * H, A)
            continue
        message = r"^attention//\w+ must have the \d+ elements of linear_\w\.weight, but has shape \["
        with pytest.raises(ValueError, match=message):
            state(name, params)
