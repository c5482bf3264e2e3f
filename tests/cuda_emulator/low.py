# SPDX-License-Identifier: BSD-3-Clause
"""Calls whose logits are very low on some rows, on some keys or on all, and what they must give.

The softmax of a row does not feel a constant that is added to all its logits, and a key far below the others does not
count. So the truth for the low call is float64's result for the same call without the constant, judged as strictly as
that; only lse moves by it. Float32 logits near -1e9 are 64 apart, which would leave nothing of random products: on low
rows all keys have the same product, an exact one.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from inputs import HALF, Inputs, accumulation
from oracle import gold
from tolerance import Judge
from torch import Tensor

from torch_gated_attn import gated_attention_with_lse

FINE = 2048.0  # beside this float32 keeps a product to 2^-13, enough for 16-bit results
EXCLUDED = -256.0  # of no weight beside logits of size 1, and exact in every type


@dataclasses.dataclass
class Case:
    inputs: Inputs  # without the constants
    offset: Tensor  # what the bias of the low call has besides, of the bias's shape
    rows: Tensor  # [Q], which rows are low
    low: float  # the constant of low rows, of the bias's type


def make(inputs: Inputs, rows: slice | None, keys: slice | None, low: float) -> Case:
    """The low rows are pushed down by `low`, and so are the low keys of every row."""
    q_len, k_len = inputs.query.shape[-2], inputs.key.shape[-2]
    device = inputs.bias.device
    low_rows, low_keys = (torch.zeros(n, dtype=torch.bool, device=device) for n in (q_len, k_len))
    if rows is not None:
        low_rows[rows] = True
    if keys is not None:
        low_keys[keys] = True
    low = torch.tensor(low, dtype=inputs.bias.dtype).item()
    query, key, bias = inputs.query.clone(), inputs.key.clone(), inputs.bias.clone()
    if inputs.query.dtype not in HALF or abs(low) > FINE:
        query[..., low_rows, :] = 0
        query[..., low_rows, 0] = 2
        key[..., 0] = 1
    bias[..., low_rows, :] = 0
    smallest = torch.finfo(bias.dtype).min
    twice = max(2 * low, smallest)
    offset = torch.zeros(q_len, k_len, dtype=bias.dtype, device=device)
    offset[low_rows] = low
    offset[:, low_keys] = low
    hidden = low_keys.expand(q_len, k_len).clone()
    if twice < low:
        offset[low_rows[:, None] & low_keys] = twice
    else:  # as low as it gets: nothing of such a row is lower than the rest
        hidden[low_rows] = False
    bias = torch.where(hidden, EXCLUDED, bias)
    return Case(inputs.replace(query=query, key=key, bias=bias), offset, low_rows, low)


def compare(judge: Judge, label: str, case: Case) -> None:
    expected = gold(case.inputs)["lse"].to(case.inputs.query.device, accumulation(case.inputs.query.dtype))

    def operator(query, key, value, gate, bias, mask, **options):
        out, lse = gated_attention_with_lse(query, key, value, gate, bias + case.offset, mask, **options)
        alive = case.rows & expected.isfinite()
        scale = query.size(-1) ** -0.5 if options["scale"] is None else options["scale"]
        # Logits are held back at the lowest number times the scale, or, where they are kept in units of log2, times ln 2.
        bound = torch.finfo(lse.dtype).min * min(abs(scale), math.log(2))
        if case.low > bound:
            error = (lse.detach() - expected - case.low)[alive].nan_to_num(math.inf).abs().max() if alive.any() else 0
            if error > 4 * torch.finfo(lse.dtype).eps * abs(case.low):
                judge.failures.append(f"{label}: lse of low rows is off by {error:.3g}")
        elif not (lse.detach()[alive] <= 0.999 * bound).all():
            judge.failures.append(f"{label}: lse of low rows is {lse.detach()[alive].max():.3g}")
        # Judged above; its gradient counts all the same.
        moved = torch.where(alive, lse - lse.detach() + expected, lse)
        return out, moved

    kept = judge.operator, judge.few_elements
    judge.operator = operator
    if case.rows.double().mean() > 0.5:  # equal probabilities have equal rounding errors, whose rms is luck
        judge.few_elements = math.inf
    results = judge.compare(label, case.inputs)
    judge.operator, judge.few_elements = kept
    for name, result in results.items():
        if not (result.isfinite() | (name == "lse")).all():
            judge.failures.append(f"{label} {name}: not finite")
