# SPDX-License-Identifier: BSD-3-Clause
"""What causal, windowed and block-sparse calls cost: beside PyTorch's causal attention, and beside full attention of ours.

    python benchmarks/attended.py [--repeat N] [--output FILE]

PyTorch's side is `scaled_dot_product_attention(is_causal=True, enable_gqa=...)` times sigmoid(gate). Decoding is one query
with a key/value cache; the speed at which it reads keys and values stands beside that of summing them, on the same threads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from torch_gated_attn import gated_attention
from torch_gated_attn._bench import machine
from torch_gated_attn._bench.measure import interleaved

CAUSAL = [(1, 8, 2, 1024, 64), (1, 8, 2, 1024, 128), (1, 4, 1, 1024, 256)]  # B, H, Hkv, L, head_dim
DECODING = [(1, 8, 8, 16384, 64), (1, 16, 2, 32768, 128)]  # B, H, Hkv, K, head_dim


def step(call: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor | None) -> Callable[[], None]:
    def run() -> None:
        if grad is None:
            with torch.no_grad():
                call()
        else:
            torch.autograd.grad(call(), inputs, grad)

    return run


def draw(b: int, h: int, hkv: int, length: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    heads = (h, hkv, hkv, h)  # query, key, value, gate
    return [torch.randn(b, n, length, d, dtype=dtype, requires_grad=True) for n in heads]


def seconds(calls: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    return {name: timing.best for name, timing in interleaved(calls, repeat, path_limit=60.0).items()}


def middle_seconds(calls: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    """For calls as fast as memory: a shared machine's bandwidth changes, and the best turns of two calls seldom meet."""
    return {name: timing.middle for name, timing in interleaved(calls, repeat, path_limit=60.0).items()}


def causal(repeat: int) -> list[dict[str, Any]]:
    rows = []
    for b, h, hkv, length, d in CAUSAL:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = draw(b, h, hkv, length, d, dtype)
            query, key, value, gate = inputs

            def sdpa(q: Tensor = query, k: Tensor = key, v: Tensor = value, g: Tensor = gate) -> Tensor:
                return (
                    scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)) * g.sigmoid()
                )

            def ours(x: list[Tensor] = inputs) -> Tensor:
                return gated_attention(*x, is_causal=True)

            for grad in (None, torch.randn_like(query)):
                t = seconds({"operator": step(ours, inputs, grad), "sdpa": step(sdpa, inputs, grad)}, repeat)
                direction = "forward" if grad is None else "forward+backward"
                shape = f"{b}, {h}, {hkv}, {length}, {d}"
                rows.append({"shape": shape, "dtype": str(dtype)[6:], "direction": direction, **t})
                print(f"causal {shape} {str(dtype)[6:]} {direction}: {t['sdpa'] / t['operator']:.2f}x", flush=True)
    return rows


def share_of_full(repeat: int) -> list[dict[str, Any]]:
    """head_dim 64, 8 heads, float32: the time of a call over that of full attention of its length."""
    blocks = torch.block_diag(*[torch.ones(128, 128)] * 8).bool()
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("causal", 1024, {"is_causal": True}),
        ("causal", 4096, {"is_causal": True}),
        ("mask of 8 blocks", 1024, {"mask": blocks}),
    ]
    rows = []
    for name, length, options in cases:
        inputs = draw(1, 8, 8, length, 64, torch.float32)
        for grad in (None, torch.randn_like(inputs[0])):
            few = step(lambda x=inputs, o=options: gated_attention(*x, **o), inputs, grad)  # type: ignore[misc]
            full = step(lambda x=inputs: gated_attention(*x), inputs, grad)  # type: ignore[misc]
            t = seconds({"few": few, "full": full}, repeat if length < 4096 else 3)
            direction = "forward" if grad is None else "forward+backward"
            rows.append({"case": name, "length": length, "direction": direction, **t})
            print(
                f"{name}, L = {length}, {direction}: {t['few'] / t['full']:.3f} of full, {t['few'] * 1e3:.1f} ms",
                flush=True,
            )
    return rows


def window(repeat: int) -> list[dict[str, Any]]:
    """A window of 512 at two lengths, in turns: what is attended grows as the length does, so its time should."""
    lengths = 4096, 8192
    inputs = {length: draw(1, 8, 8, length, 64, torch.float32) for length in lengths}
    rows = []
    for direction in ("forward", "forward+backward"):
        calls = {}
        for length, x in inputs.items():
            grad = None if direction == "forward" else torch.randn_like(x[0])
            calls[str(length)] = step(lambda x=x: gated_attention(*x, is_causal=True, window=512), x, grad)  # type: ignore[misc]
        t = middle_seconds(calls, repeat)
        rows.append({"direction": direction, **t})
        print(f"window 512, {direction}: L = 8192 takes {t['8192'] / t['4096']:.2f} of L = 4096", flush=True)
    return rows


def decoding(repeat: int) -> list[dict[str, Any]]:
    rows = []
    for b, h, hkv, keys, d in DECODING:
        query, gate = torch.randn(b, h, 1, d), torch.randn(b, h, 1, d)
        key, value = torch.randn(b, hkv, keys, d), torch.randn(b, hkv, keys, d)

        def ours(q: Tensor = query, k: Tensor = key, v: Tensor = value, g: Tensor = gate) -> Tensor:
            return gated_attention(q, k, v, g, is_causal=True)

        def sdpa(q: Tensor = query, k: Tensor = key, v: Tensor = value, g: Tensor = gate) -> Tensor:
            return scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1)) * g.sigmoid()

        def read(k: Tensor = key, v: Tensor = value) -> Tensor:
            return k.sum() + v.sum()

        calls = {"operator": step(ours, [], None), "sdpa": step(sdpa, [], None), "sum": step(read, [], None)}
        t = middle_seconds(calls, max(repeat, 25))
        rows.append({"shape": f"{b}, {h}, {hkv}, {keys}, {d}", **t})
        rate = {name: 2 * key.numel() * 4 / s / 1e9 for name, s in t.items()}
        print(
            f"decoding {b}, {h}, {hkv}, {keys}, {d}: {t['sdpa'] / t['operator']:.2f}x, {rate['operator']:.1f} GB/s, "
            f"summing {rate['sum']:.1f} GB/s",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9, help="turns, default 9")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {
        "machine": machine.describe(),
        "causal": causal(args.repeat),
        "share_of_full": share_of_full(args.repeat),
        "window": window(args.repeat),
        "decoding": decoding(args.repeat),
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
