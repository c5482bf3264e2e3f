# SPDX-License-Identifier: BSD-3-Clause
"""A training step (forward, backward) of whole models, with `integrations.patch` and without: time, memory, difference.

Weights are random, sizes small enough for a CPU. Models whose package is not installed are left out.

    pip install transformers
    python benchmarks/models.py
    python benchmarks/models.py --models evoformer --length 64 --repeat 2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_gated_attn._bench import machine
from torch_gated_attn._bench.measure import interleaved
from torch_gated_attn._bench.memory import RESET_PEAK, peak_resident_mib
from torch_gated_attn.integrations import patch

RESULTS = Path(__file__).with_name("results") / "models.json"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
VARIANTS = ("original", "replaced")


@dataclass
class Step:
    """A model and its scalar loss; calling it runs forward and backward."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]

    def __call__(self) -> None:
        self.model.zero_grad()
        self.loss(self.model).backward()


def esmfold(length: int) -> Step:
    """ESMFold's folding trunk: one block of its published pair width, one of its structure module."""
    from transformers.models.esm.configuration_esm import TrunkConfig
    from transformers.models.esm.modeling_esmfold import EsmFoldingTrunk

    structure = {"sequence_dim": 64, "pairwise_dim": 32, "num_blocks": 1, "num_heads_ipa": 2, "resnet_dim": 32}
    config = TrunkConfig(
        num_blocks=1, sequence_state_dim=256, pairwise_state_dim=128, chunk_size=None, structure_module=structure
    )
    model = EsmFoldingTrunk(config)
    sequence, pair = torch.randn(1, length, 256), torch.randn(1, length, length, 128)
    mask = torch.ones(1, length, dtype=torch.long)
    mask[:, length - length // 8 :] = 0
    residues, positions = torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]

    def loss(trunk: nn.Module) -> Tensor:
        out = trunk(sequence, pair, residues, positions, mask, no_recycles=0)
        return out["s_s"].square().mean() + out["s_z"].square().mean()

    return Step(model, loss)


def evoformer(length: int) -> Step:
    """One Evoformer block with OpenFold's attention interface on 64 sequences."""
    from openfold_block import MSA_DIM, PAIR_DIM, EvoformerBlock

    msa, pair = torch.randn(64, length, MSA_DIM), torch.randn(length, length, PAIR_DIM)
    exists = (torch.arange(length) < length - length // 8).float()
    masks = exists.expand(64, length), exists[:, None] * exists

    def loss(block: nn.Module) -> Tensor:
        return sum((x.square().mean() for x in block(msa, pair, *masks)), torch.zeros(()))

    return Step(EvoformerBlock(), loss)


def qwen3_next(length: int) -> Step:
    """The two-layer Qwen3-Next of examples/qwen3_next_tiny.py."""
    sys.path.insert(0, str(EXAMPLES))
    from qwen3_next_tiny import batches, build_model

    (tokens,) = batches(length, steps=1, rows=1)
    return Step(build_model(), lambda model: model(input_ids=tokens, labels=tokens, use_cache=False).loss)


# name: the step of a length, its default length, the package it needs
MODELS: dict[str, tuple[Callable[[int], Step], int, str | None]] = {
    "esmfold": (esmfold, 256, "transformers"),
    "evoformer": (evoformer, 256, None),
    "qwen3_next": (qwen3_next, 1024, "transformers"),
}


def build(name: str, variant: str, length: int) -> Step:
    torch.manual_seed(0)
    step = MODELS[name][0](length)
    if variant == "replaced":
        print(patch(step.model), file=sys.stderr)
    return step


def peak_mib(name: str, variant: str, length: int) -> float:
    """Growth of the peak resident memory by one step, in a process of its own."""
    command = [sys.executable, __file__, "--step", variant, "--models", name, "--length", str(length)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(name: str, variant: str, length: int) -> None:
    build(name, variant, 16)()  # threads, libraries and code pages first
    step = build(name, variant, length)
    RESET_PEAK.write_text("5")
    before = peak_resident_mib()
    step()
    print(peak_resident_mib() - before)


def measure(name: str, length: int, repeat: int, with_memory: bool) -> dict[str, Any]:
    steps = {variant: build(name, variant, length) for variant in VARIANTS}
    losses = {variant: step.loss(step.model).item() for variant, step in steps.items()}
    timings = interleaved(dict(steps), repeat, path_limit=120.0)
    rows = {
        variant: {
            "milliseconds": 1e3 * timings[variant].middle,
            "fastest_milliseconds": 1e3 * timings[variant].best,
            "peak_mib": peak_mib(name, variant, length) if with_memory else None,
            "loss": losses[variant],
        }
        for variant in VARIANTS
    }
    return {"model": name, "what": MODELS[name][0].__doc__, "length": length, **rows}


def describe(row: dict[str, Any]) -> str:
    before, after = (row[variant] for variant in VARIANTS)
    ratio = before["milliseconds"] / after["milliseconds"]
    text = f"{row['model']}, length {row['length']}: "
    text += f"{before['milliseconds']:.0f} ms to {after['milliseconds']:.0f} ms ({ratio:.2f}x)"
    if before["peak_mib"] is not None:
        text += f", peak {before['peak_mib']:.0f} MiB to {after['peak_mib']:.0f} MiB"
    return f"{text}, loss {before['loss']:.6f} and {after['loss']:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"default {','.join(MODELS)}")
    parser.add_argument("--length", type=int, help="residues or tokens (default: 256 residues, 1024 tokens)")
    parser.add_argument("--repeat", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: as torch chooses")
    parser.add_argument("--json", type=Path, default=RESULTS, help="default benchmarks/results/models.json")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave the peak memory out, a process per model and variant"
    )
    parser.add_argument("--step", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"--models must be among {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    if arguments.step:
        return print_peak(names[0], arguments.step, arguments.length)

    results = []
    for name in names:
        _, length, package = MODELS[name]
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
            continue
        row = measure(name, arguments.length or length, arguments.repeat, not arguments.no_memory)
        results.append(row)
        print(describe(row), flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": machine.describe(), "models": results}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
