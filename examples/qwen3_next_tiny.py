# SPDX-License-Identifier: BSD-3-Clause
"""Train a tiny Qwen3-Next of Hugging Face transformers with its gated attention replaced by the operator, and one without.

Both start from the same random weights and read the same bytes, the sources of this library. Prints what was replaced, both
loss curves and the time of a step; the exit code says whether the curves agree.

    pip install transformers
    python examples/qwen3_next_tiny.py
    python examples/qwen3_next_tiny.py --steps 4 --length 64
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from torch_gated_attn.integrations import patch

TOLERANCE = 1e-4  # relative, of the loss at every step; rounding grows from step to step
BYTES = 256


def build_model(seed: int = 0) -> nn.Module:
    """Two layers, one of them the gated attention with the published head_dim of 256; everything else is small."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(seed)
    config = Qwen3NextConfig(
        vocab_size=BYTES,
        hidden_size=128,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3NextForCausalLM(config)


def batches(length: int, steps: int, rows: int = 2) -> list[Tensor]:
    sources = sorted((Path(__file__).resolve().parent.parent / "torch_gated_attn").glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - length, (steps, rows), generator=generator)
    return [torch.stack([text[start : start + length] for start in row]) for row in starts.tolist()]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> tuple[float, float]:
    """Loss and seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.item(), time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="training steps of each model (default 20)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default 256)")
    arguments = parser.parse_args()

    original = build_model()
    replaced = copy.deepcopy(original)
    print(patch(replaced))
    models = {"original": original, "replaced": replaced}
    # eps well above the rounding noise of a gradient that is truly zero: Adam would turn that noise into full steps.
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}

    print(f"\n{'step':>4}  {'original':>9}  {'replaced':>9}  difference")
    for step, tokens in enumerate(batches(arguments.length, arguments.steps)):
        for name, model in models.items():
            loss, elapsed = train_step(model, optimizers[name], tokens)
            losses[name].append(loss)
            seconds[name].append(elapsed)
        a, b = losses["original"][-1], losses["replaced"][-1]
        print(f"{step:>4}  {a:>9.5f}  {b:>9.5f}  {abs(b - a) / a:.1e}", flush=True)

    worst = max(abs(b - a) / a for a, b in zip(losses["original"], losses["replaced"], strict=True))
    agree = worst <= TOLERANCE
    times = ", ".join(f"{name} {1e3 * median(values[1:] or values):.0f} ms" for name, values in seconds.items())
    print(f"\nmedian step: {times}")
    print(f"loss curves {'agree' if agree else 'DISAGREE'}: largest relative difference {worst:.1e}, limit {TOLERANCE:.0e}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
