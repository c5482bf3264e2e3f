# SPDX-License-Identifier: BSD-3-Clause
"""A replaced module computes what the original computes: result, every parameter's and every input's gradient.

The yardstick is the original in float64. The replaced module's largest error may be twice, of a gradient three times, the
error that the original makes in the same dtype, as in tolerance.py, plus a few roundings of the result. `pytest -s` prints
the ratios and the releases of the packages.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from cases import INSTALLED, WRITTEN, Case, release
from torch import Tensor, nn

from torch_gated_attn.integrations import patch

ROUNDINGS = 4  # of the largest value: the original's few elements may all be right by luck


def randomise(module: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter, also those that start at 0, a number that `dtype` holds."""
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.size(-1) ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_((torch.randn_like(parameter) * scale).to(dtype))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors as leaves of `dtype` that require grad, unless they hold a mask (0, 1 or a huge number)."""
    if isinstance(value, (list, tuple)):
        return type(value)(cast(x, dtype) for x in value)
    if isinstance(value, dict):
        return {key: cast(x, dtype) for key, x in value.items()}
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    is_mask = bool(((value == 0) | (value == 1) | (value < -1e4)).all())
    low = value.to(dtype).clamp_min(torch.finfo(dtype).min) if is_mask else value.to(dtype)
    return low if is_mask else low.detach().clone().requires_grad_()


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [leaf for x in value for leaf in leaves(x)]
    return [value] if isinstance(value, Tensor) and value.requires_grad else []


def evaluate(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    out = module(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    named = dict(module.named_parameters())
    named.update({f"input {i}": x for i, x in enumerate(leaves([*args, *kwargs.values()]))})
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(out, list(named.values()), cotangent.to(out.dtype), allow_unused=True)
    results = {"out": out.detach()}
    results.update({f"grad {name}": g for name, g in zip(named, grads, strict=True) if g is not None})
    return results


def compare(name: str, case: Case, dtype: torch.dtype) -> None:
    exact = case.make().double()
    randomise(exact, dtype)
    args, kwargs = cast(case.arguments(), dtype)
    original = copy.deepcopy(exact).to(dtype)
    replaced = copy.deepcopy(original)
    report = patch(replaced)
    assert any(m.path == "" for m in report.replaced), report  # and what is inside it
    state = {name: p.clone() for name, p in original.state_dict().items()}
    # Some modules call .float() on what they attend with; the yardstick stays in float64.
    with mock.patch.object(torch.Tensor, "float", lambda x: x):
        gold = evaluate(exact, *cast((args, kwargs), torch.float64))
    low, ours = evaluate(original, args, kwargs), evaluate(replaced, args, kwargs)
    assert replaced.state_dict().keys() == state.keys()
    assert gold.keys() == low.keys() == ours.keys()
    ratios = {}
    largest = max(true.abs().max().item() for true in gold.values())
    for key, true in gold.items():
        assert ours[key].dtype == low[key].dtype, key
        error, allowed = ((x[key].double() - true).abs().max().item() for x in (ours, low))
        size = true.abs().max().item()
        # The same constant added to every logit changes nothing: such a gradient is 0, and what is found is rounding.
        unit = torch.finfo(dtype).eps * (size if size > 1e-9 * largest else largest)
        factor = 2 if key == "out" else 3
        assert error <= factor * allowed + ROUNDINGS * unit, f"{name} {dtype} {key}: {error:.3g} against {allowed:.3g}"
        ratios[key] = error / max(allowed, unit)
    grads = [ratio for key, ratio in ratios.items() if key != "out"]
    print(f"\n{name}, {dtype}: out {ratios['out']:.2f}, gradients at most {max(grads):.2f} of the original's error", end="")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRITTEN)
def test_same_interface(name, dtype):
    compare(name, WRITTEN[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INSTALLED)
def test_the_packages_own(name, dtype):
    """In the release that is installed, which the test names."""
    saw = release(type(INSTALLED[name].make()))
    compare(f"{name} of {saw}", INSTALLED[name], dtype)
