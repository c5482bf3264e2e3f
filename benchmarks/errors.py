# SPDX-License-Identifier: BSD-3-Clause
"""The operator's error over that of plain PyTorch in the same dtype, per output: a table, JSON and a plot.

`python benchmarks/errors.py --json F --png F`. Inputs are drawn in the dtype; the truth is plain PyTorch in float64 at the
same inputs. Each ratio is of root-mean-square errors over all elements of a result. The operator's lse is float32 whatever
the inputs' dtype, so it is also judged by plain PyTorch's in float32: lse32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch

import torch_gated_attn
from torch_gated_attn import reference
from torch_gated_attn._bench import machine

OUTPUTS = ("out", "lse", "d_query", "d_key", "d_value", "d_gate", "d_bias", "lse32")
DTYPES = ("float32", "bfloat16", "float16")
# Logits of a trained model reach tens, of a fresh one about 1.
CASES = list(itertools.product((8, 16, 32, 64), (40, 129, 256), (1.0, 6.0)))


def evaluate(function, tensors, mask, cotangents):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = function(*leaves, mask)
    grads = torch.autograd.grad([out, lse], leaves, [c.to(r.dtype) for c, r in zip(cotangents, (out, lse), strict=True)])
    return [r.detach().double() for r in (out, lse, *grads)]


def ratios(dtype: torch.dtype) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in OUTPUTS}
    for seed, (head_dim, length, spread) in enumerate(CASES):
        draw = torch.Generator().manual_seed(seed)
        shape = (3, 2, length, head_dim)
        tensors = [torch.randn(shape, generator=draw) for _ in range(4)]
        tensors.append(torch.randn(1, 2, length, length, generator=draw))
        tensors[0] *= spread
        tensors = [t.to(dtype) for t in tensors]
        mask = torch.rand(3, 1, 1, length, generator=draw) > 0.1
        cotangents = [torch.randn(shape, generator=draw).to(dtype), torch.randn(shape[:-1], generator=draw)]
        gold = evaluate(reference.gated_attention_with_lse, [t.double() for t in tensors], mask, cotangents)
        plain = evaluate(reference.gated_attention_with_lse, tensors, mask, cotangents)
        ours = evaluate(torch_gated_attn.gated_attention_with_lse, tensors, mask, cotangents)
        plain.append(reference.gated_attention_with_lse(*(t.float() for t in tensors), mask)[1].double())
        gold.append(gold[1])
        ours.append(ours[1])
        for name, o, p, g in zip(OUTPUTS, ours, plain, gold, strict=True):
            found[name].append(((o - g).square().mean().sqrt() / (p - g).square().mean().sqrt()).item())
    return found


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (dtype, by_output) in zip(axes, results.items(), strict=True):
        axis.boxplot(list(by_output.values()), whis=(0, 100), tick_labels=list(by_output))
        axis.axhline(1, color="tab:red", linewidth=1)
        axis.set_title(dtype)
        axis.tick_params(axis="x", rotation=45)
    axes[0].set_ylabel("rms error / rms error of plain PyTorch")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    results = {dtype: ratios(getattr(torch, dtype)) for dtype in DTYPES}
    print(f"{'':10}" + "".join(f"{dtype + ' median / most':>26}" for dtype in DTYPES))
    for name in OUTPUTS:
        columns = (f"{statistics.median(results[dtype][name]):.2f} / {max(results[dtype][name]):.2f}" for dtype in DTYPES)
        print(f"{name:10}" + "".join(f"{column:>26}" for column in columns))
    if arguments.json:
        document = {"machine": machine.describe(), "cases": CASES, "ratios": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.png:
        plot(results, arguments.png)


if __name__ == "__main__":
    main()
