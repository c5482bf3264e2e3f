# SPDX-License-Identifier: BSD-3-Clause
"""The operator, and the oracle that the other tests trust, against the formula in loops over numbers of fifty digits.

Gradients come from differences of the loss, so that no derivative was worked out by hand: with fifty digits a step of 1e-15
leaves an error of 1e-30. Nothing here is PyTorch's softmax or autograd.
"""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from inputs import DIFFERENTIABLE, POLICIES, Inputs, draw, evaluate
from oracle import oracle

from torch_gated_attn import gated_attention_with_lse

HEADS, KV_HEADS, Q, K, D, DV = 2, 1, 3, 4, 2, 3
STEP = mpmath.mpf("1e-15")
Numbers = dict[str, np.ndarray]  # of mpf


def small_call(masked_rows: str) -> Inputs:
    sizes = {"batch": (), "heads": HEADS, "kv_heads": KV_HEADS, "q": Q, "k": K, "d": D, "dv": DV}
    inputs = draw(seed=1, dtype=torch.float64, mask="full", masked_rows=masked_rows, scale=0.7, **sizes)
    inputs.mask[1, 2] = False
    return inputs


def formula(x: Numbers, mask: np.ndarray, scale: float, masked_rows: str) -> tuple[np.ndarray, np.ndarray]:
    """out and lse, element by element."""
    out, lse = np.empty((HEADS, Q, DV), object), np.empty((HEADS, Q), object)
    for h, i in itertools.product(range(HEADS), range(Q)):
        kv = h // (HEADS // KV_HEADS)
        keys = [j for j in range(K) if mask[h, i, j]]
        logits = {
            j: mpmath.mpf(scale) * sum(x["query"][h, i, d] * x["key"][kv, j, d] for d in range(D)) + x["bias"][h, i, j]
            for j in keys
        }
        total = sum(mpmath.exp(s) for s in logits.values())
        weights = {j: mpmath.exp(s) / total for j, s in logits.items()}
        if not keys and masked_rows == "mean":
            weights = {j: mpmath.mpf(1) / K for j in range(K)}
        lse[h, i] = mpmath.log(total) if keys else -mpmath.inf
        for d in range(DV):
            attended = sum((w * x["value"][kv, j, d] for j, w in weights.items()), mpmath.mpf(0))
            out[h, i, d] = attended / (1 + mpmath.exp(-x["gate"][h, i, d]))
    return out, lse


def exact(inputs: Inputs) -> Numbers:
    """out, lse and d_query, ... in fifty digits."""
    with mpmath.workdps(50):
        to_mpf = np.frompyfunc(lambda number: mpmath.mpf(float(number)), 1, 1)
        x = {name: to_mpf(getattr(inputs, name).numpy()).astype(object) for name in DIFFERENTIABLE}
        cotangents = [to_mpf(t.numpy()).astype(object) for t in (inputs.grad_out, inputs.grad_lse)]
        mask = inputs.mask.numpy()

        def loss() -> mpmath.mpf:
            out, lse = formula(x, mask, inputs.scale, inputs.masked_rows)
            finite = [a * b for a, b in zip(lse.flat, cotangents[1].flat, strict=True) if mpmath.isfinite(a)]
            return (out * cotangents[0]).sum() + sum(finite)

        results: Numbers = dict(zip(("out", "lse"), formula(x, mask, inputs.scale, inputs.masked_rows), strict=True))
        for name, numbers in x.items():
            gradient = np.empty(numbers.shape, object)
            for index in np.ndindex(numbers.shape):
                kept = numbers[index]
                numbers[index] = kept + STEP
                above = loss()
                numbers[index] = kept - STEP
                gradient[index] = (above - loss()) / (2 * STEP)
                numbers[index] = kept
            results[f"d_{name}"] = gradient
        return results


def largest_error(result: np.ndarray, true: np.ndarray) -> float:
    worst = 0.0
    for a, b in zip(result.flat, true.flat, strict=True):
        if mpmath.isinf(b):
            assert a == -math.inf
        else:
            worst = max(worst, abs(float(mpmath.mpf(float(a)) - b)))
    return worst


@pytest.mark.parametrize("masked_rows", POLICIES)
def test_operator_and_oracle_in_fifty_digits(masked_rows):
    inputs = small_call(masked_rows)
    true = exact(inputs)
    assert any(abs(float(number)) > 0.01 for number in true["d_bias"].flat)
    ours = {name: tensor.numpy() for name, tensor in evaluate(gated_attention_with_lse, inputs).items()}
    trusted = oracle(inputs)
    assert set(true) == set(ours)
    for name, numbers in true.items():
        assert largest_error(ours[name], numbers) < 1e-14, name
        assert largest_error(trusted[name].astype(np.float64), numbers) < 1e-15, name
