# SPDX-License-Identifier: BSD-3-Clause
"""Which tiles the CUDA kernels compute, counted by the emulator: exactly those in which a query attends to a key."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from cuda_emulator import harness
from cuda_emulator.as_cpu import Operator, as_cpu_kernels
from inputs import draw, evaluate
from oracle import visible
from tolerance import Judge

from torch_gated_attn import gated_attention_with_lse

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
B, H, Q, K = 2, 2, 200, 210  # several tiles of every kernel, the last ones of a part


def block_diagonal(blocks: int) -> torch.Tensor:
    query, key = torch.arange(Q) * blocks // Q, torch.arange(K) * blocks // K
    return query[:, None] == key


def one_pair() -> torch.Tensor:
    mask = torch.zeros(Q, K, dtype=torch.bool)
    mask[131, 197] = True
    return mask


SEEN = {
    "everything": {},
    "causal": {"is_causal": True},
    "causal, few queries": {"is_causal": True, "q": 70},
    "causal, few keys": {"is_causal": True, "k": 70},
    "window": {"is_causal": True, "window": 33},
    "window of one": {"is_causal": True, "window": 1},
    "lengths": {"key_lengths": [0, 65]},
    "lengths and causal": {"key_lengths": [128, 210], "is_causal": True, "window": 100},
    "blocks": {"mask": block_diagonal(5)},
    "blocks of a head, causal": {"mask": torch.stack([block_diagonal(3), block_diagonal(7)]), "is_causal": True},
    "one pair": {"mask": one_pair()},
    "nothing": {"mask": torch.zeros(B, 1, 1, K, dtype=torch.bool)},
    "half of the keys": {"mask": (torch.arange(K) < 96).expand(B, 1, 1, K)},
}
# What makes the operator take which kernels, and the shared memory of the device.
WAYS = {
    "no bias": ({"bias": None}, 0),
    "shared bias": ({"bias": (1, H, Q, K)}, 0),
    "float32 bias, no strip": ({"bias_dtype": FP32}, 1024),
    "general": ({"scale": 1.5}, 0),
    "float32": ({"dtype": FP32, "bias": (1, H, Q, K), "bias_dtype": FP32}, 0),
    "float32, no strip": ({"dtype": FP32, "bias_dtype": FP32}, 1024),
    "plain": ({"dtype": FP64}, 0),
}
# One after the other, since every kernel computes tiles by the same rule.
CALLS = [
    *itertools.product(SEEN, ["no bias"]),
    *((s, w) for s in ("causal", "lengths", "blocks", "one pair") for w in WAYS),
]


def attended(inputs) -> torch.Tensor:
    """[B, H, Q, K]"""
    pairs = torch.from_numpy(visible(inputs))
    if inputs.mask is not None:
        pairs = pairs & inputs.mask
    return pairs.expand(*inputs.query.shape[:-1], inputs.key.size(-2))


@pytest.mark.parametrize(("seen", "way"), dict.fromkeys(CALLS))
def test_tiles_computed_are_those_with_an_attended_pair(library, seen, way):
    changes, shared_bytes = WAYS[way]
    options = {"dtype": BF16, "batch": (B,), "heads": H, "q": Q, "k": K, "d": 8, "gate": None, "mask": None, **changes}
    mask = SEEN[seen].get("mask")
    inputs = draw(seed=1, **{**options, **{k: v for k, v in SEEN[seen].items() if k != "mask"}})
    inputs = inputs.replace(mask=mask)
    pairs = attended(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with as_cpu_kernels(Operator(library, shared_bytes=shared_bytes)), harness.recorded_tiles() as tiles:
            evaluate(gated_attention_with_lse, inputs)
    kernels = {tile.kernel for tile in tiles}
    assert len(kernels) >= 3 or not pairs.any()
    for kernel in kernels:
        found = [tile for tile in tiles if tile.kernel == kernel]
        assert len(found) == len(set(found))
        queries, keys = found[0].queries, found[0].keys
        padded = torch.zeros(
            B, H, -(-pairs.size(2) // queries) * queries, -(-pairs.size(3) // keys) * keys, dtype=torch.bool
        )
        padded[:, :, : pairs.size(2), : pairs.size(3)] = pairs
        blocks = padded.unflatten(3, (-1, keys)).unflatten(2, (-1, queries))  # [B, H, query tile, queries, key tile, keys]
        expected = {tuple(place) for place in blocks.any(5).any(3).nonzero().tolist()}
        assert {(t.entry, t.head, t.query // queries, t.key // keys) for t in found} == expected, kernel


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("seen", ["everything", "causal", "window", "blocks"])
def test_full_tiles_take_the_loop_without_a_look_at_pairs(library, seen, dtype):
    inputs = draw(seed=1, dtype=dtype, batch=(1,), heads=1, q=192, k=192, d=8, bias=None, gate=None, mask=None)
    inputs = inputs.replace(**{k: v for k, v in SEEN[seen].items() if k != "mask"})
    if seen == "blocks":
        block = torch.arange(192) // 64
        inputs = inputs.replace(mask=block[:, None] >= block)
    pairs = attended(inputs)[0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with as_cpu_kernels(Operator(library)), harness.recorded_tiles() as tiles:
            judge = Judge()
            judge.compare(seen, inputs)
            judge.verdict()
    for t in tiles:
        full = pairs[t.query : t.query + t.queries, t.key : t.key + t.keys].all().item()
        # The key-stationary kernel sets what it made of keys past the end to zero.
        inside = t.key + t.keys <= 192 or "key" in t.kernel.variant
        assert t.masked == (not (full and inside)), t
