# SPDX-License-Identifier: BSD-3-Clause
"""The one rule by which the tests judge an error.

GOLD is the oracle at the inputs as they are; REF is plain PyTorch (torch_gated_attn.reference) in the inputs' dtype;
OUT is the operator. For out, lse and every gradient:

    max|OUT - GOLD| <= f * max|REF - GOLD| + u            f = 2 for out and lse, 3 for gradients
    rms(OUT - GOLD) <= rms(REF - GOLD)                    16-bit results, and the median of the ratios is below 0.7
    rms(OUT - GOLD) <= 2 * rms(REF - GOLD) + u            float32 and float64 results

u is one unit in the last place, not of the result but of the sum of the absolute values of the terms that were added up
to it: where a true gradient is 0 because two large terms cancel (one attended key), their rounding is no error. The
rounding of the exponential, good to 1.3 units, and of the logits adds to u, in the accumulation type: a probability's
relative error is its logit's absolute error.
The rms of a 16-bit result is granted u where comparing it with REF's says nothing: where the result is smaller than u;
where it has few elements, of which REF's may all be right by luck; and with few keys, where delta, which is computed from
the rounded out, nearly cancels the only other term.

lse is float32 for 16-bit inputs, so its REF is plain PyTorch in float32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from inputs import DIFFERENTIABLE, HALF, Inputs, accumulation, evaluate
from oracle import gold as evaluate_gold
from oracle import visible
from torch import Tensor

import torch_gated_attn
from torch_gated_attn import reference

MEDIAN_RATIO = 0.7
FEW_RATIOS = 30  # fewer have no median worth the name
FEW_ELEMENTS = 256
FEW_KEYS = 12  # 16-bit products of P and dS: up to here a gradient may be as wrong as REF, and by luck a tenth more
# Kernels keep a row's exponents about 7 below its shift, where two roundings, of the difference and of the logarithm of
# the sum, are half a unit of 4 each: an absolute error of lse, which plain PyTorch does not have where lse is nearly 0.
EXPONENT_ROUNDING = 3


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item() if error.numel() else 0.0


def largest(error: Tensor) -> float:
    return error.abs().max().item() if error.numel() else 0.0


def keys_of_a_row(inputs: Inputs) -> float:
    """As many as a row attends to, the mean of those that attend to any; all, where a mask alone hides some."""
    if inputs.visibility == (False, None, None) and (inputs.mask is None or inputs.mask.double().mean() > 0.5):
        return inputs.key.size(-2)
    seen = visible(inputs) if inputs.mask is None else visible(inputs) & inputs.mask.cpu().numpy()
    count = seen.sum(-1)
    return count[count > 0].mean().item() if count.any() else 0.0


class Judge:
    """Compares calls of the operator with GOLD and REF, and fails once, at the end, with every failure in one message."""

    def __init__(
        self,
        operator: Callable[..., tuple[Tensor, Tensor]] = torch_gated_attn.gated_attention_with_lse,
        median_ratio: float = MEDIAN_RATIO,
        rms_ratio: float = 1.0,
    ) -> None:
        self.operator, self.median_ratio, self.rms_ratio = operator, median_ratio, rms_ratio
        self.few_elements: float = FEW_ELEMENTS
        self.failures: list[str] = []
        self.ratios: list[float] = []
        self.compared = 0

    def compare(self, label: object, inputs: Inputs, wrt: Sequence[str] = DIFFERENTIABLE) -> dict[str, Tensor]:
        """Judge one call; returns what the operator returned."""
        gold = evaluate_gold(inputs)
        ref = evaluate(reference.gated_attention_with_lse, inputs, wrt)
        if inputs.query.dtype in HALF:
            ref["lse"] = evaluate(reference.gated_attention_with_lse, inputs.to(torch.float32), ())["lse"]
        out = evaluate(self.operator, inputs, wrt)
        for name, result in out.items():
            self._compare_one(f"{label} {name}", name, inputs, result, gold, ref[name])
        return out

    def _compare_one(
        self, label: str, name: str, inputs: Inputs, out: Tensor, gold: dict[str, Tensor], ref: Tensor
    ) -> None:
        self.compared += 1
        dtype, true = inputs.query.dtype, gold[name]
        expected = accumulation(dtype) if name == "lse" else dtype
        if name.startswith("d_"):
            expected = getattr(inputs, name[2:]).dtype
        if out.shape != true.shape or out.dtype != expected:
            self.failures.append(f"{label}: {list(out.shape)} {out.dtype}, expected {list(true.shape)} {expected}")
            return
        out, ref = out.double().cpu(), ref.double().cpu()
        infinite = true.isinf()
        if not torch.equal(out[infinite], true[infinite]):
            self.failures.append(f"{label}: infinities differ")
            return
        out_error, ref_error = (out - true)[~infinite], (ref - true)[~infinite]

        unit = self._unit(name, dtype, expected, gold)
        factor = 3 if name.startswith("d_") else 2
        half = expected in HALF
        max_bound = factor * largest(ref_error) + unit
        if not largest(out_error) <= max_bound:  # also where the error is NaN
            self.failures.append(
                f"{label}: largest error {largest(out_error):.3g} > {factor} * {largest(ref_error):.3g} + {unit:.3g}"
            )
        few = true.numel() < self.few_elements or keys_of_a_row(inputs) < FEW_KEYS
        luck = few or rms(true[~infinite]) <= unit
        rms_bound = self.rms_ratio * rms(ref_error) + (unit if luck else 0.0) if half else 2 * rms(ref_error) + unit
        if not rms(out_error) <= rms_bound:
            self.failures.append(f"{label}: rms error {rms(out_error):.3g} > {rms_bound:.3g}")
        if half and not luck and rms(ref_error) > 0:
            self.ratios.append(rms(out_error) / rms(ref_error))

    def _unit(self, name: str, dtype: torch.dtype, result: torch.dtype, gold: dict[str, Tensor]) -> float:
        terms, logits = largest(gold[f"terms_{name}"]), largest(gold["terms_logits"])
        fine = torch.finfo(accumulation(dtype)).eps
        if name == "lse":
            return fine * (EXPONENT_ROUNDING + terms + logits)
        coarse = max(torch.finfo(dtype).eps, torch.finfo(result).eps)  # a float32 bias may stand beside other inputs
        return terms * (coarse + fine * (1 + logits))

    def verdict(self) -> None:
        assert self.compared > 0, "nothing was compared"
        shown = "\n".join(self.failures[:30])
        assert not self.failures, f"{len(self.failures)} of {self.compared} results outside the tolerance:\n{shown}"
        if len(self.ratios) >= FEW_RATIOS:
            median = statistics.median(self.ratios)
            assert median < self.median_ratio, (
                f"median of rms(OUT - GOLD) / rms(REF - GOLD) is {median:.3f}, not below {self.median_ratio}"
            )
