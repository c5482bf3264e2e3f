# SPDX-License-Identifier: BSD-3-Clause
"""Causal calls, sliding windows and key lengths: values and every gradient by the tolerance rule.

test_visibility_header.py has what the kernels ask, test_hidden_keys.py what may stand in hidden keys,
test_visibility_framework.py PyTorch's tools.
"""

from __future__ import annotations

import random

import pytest
import torch
from inputs import DTYPES, POLICIES, Inputs, draw, evaluate
from tolerance import Judge

from torch_gated_attn import gated_attention_with_lse


@pytest.mark.parametrize(("d", "masked_rows"), [(6, "zero"), (64, "mean")])
@pytest.mark.parametrize(("q", "k"), [(1, 1), (1, 5), (3, 7), (5, 5), (7, 3)])
def test_every_window_and_every_length(device, q, k, masked_rows, d):
    """A batch entry to each length from -1 to K + 1. Up to 4 queries, or 8 of head_dim 64, take a kernel of their own."""
    judge = Judge()
    batch = k + 3
    terms = {"bias": (2, q, k), "mask": None, "masked_rows": masked_rows}
    for lengths in (None, torch.arange(-1, k + 2)):
        for window in (None, *range(1, k + 2), 2**62):
            inputs = draw(
                seed=k,
                device=device,
                batch=(batch,),
                kv_heads=1,
                q=q,
                k=k,
                d=d,
                is_causal=True,
                window=window,
                key_lengths=lengths,
                **terms,
            )
            judge.compare((q, k, window, lengths is not None), inputs)
    judge.compare((q, k, "not causal"), inputs.replace(is_causal=False, window=None))
    judge.verdict()


@pytest.mark.parametrize("window", [None, 1, 2, 32, 33])
def test_every_offset_of_the_diagonal_within_a_tile(device, window):
    """So that there are blocks of queries that see only the first, or only the last key of a tile."""
    judge = Judge()
    for k in range(48, 82):
        inputs = draw(seed=k, device=device, batch=(), heads=1, q=64, k=k, d=4, bias=None, mask=None, is_causal=True)
        judge.compare((k, window), inputs.replace(window=window))
    judge.verdict()


# Around a vector of lanes, a tile of 32 keys and a super-block of 256 queries.
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 129, 257)


def random_call(rng: random.Random, dtype: torch.dtype, device: str) -> Inputs:
    q, k = rng.choice(LENGTHS), rng.choice(LENGTHS)
    batch = rng.choice([(2,), (1, 3)])
    heads, kv_heads = rng.choice([(2, 2), (4, 2), (3, 1)]) if q * k < 10_000 else (2, 1)
    one = tuple(1 for _ in batch)
    bias = rng.choice([None, (*batch, heads, q, k), (heads, q, k), (*batch, 1, 1, k), (q, 1), (1, 1, k)])
    mask = rng.choice([None, "key", "full", (*one, heads, 1, k), (q, k), (*batch, 1, 1, 1)])
    is_causal = rng.random() < 0.8
    return draw(
        seed=rng.randrange(2**20),
        dtype=dtype,
        device=device,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q=q,
        k=k,
        d=rng.choice([3, 8, 24, 64, 80]),
        dv=rng.choice([5, 8, 16, 64]),
        gate=rng.choice([None, "full", "head"]),
        bias=bias,
        mask=mask,
        masked_rows=rng.choice(POLICIES),
        is_causal=is_causal,
        window=rng.choice([None, 1, 2, 31, 32, 33, 64, 100, k, k + 1]) if is_causal else None,
        key_lengths=torch.randint(-1, k + 2, batch, generator=torch.Generator().manual_seed(q + k)).tolist()
        if rng.random() < 0.5 or not is_causal
        else None,
    )


def described(inputs: Inputs) -> tuple[object, ...]:
    shapes = [None if x is None else tuple(x.shape) for x in inputs.tensors]
    return *shapes, inputs.window if inputs.is_causal else "not causal", inputs.key_lengths


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_calls_around_tiles(device, dtype):
    """Biases and masks of every kind besides, grouped heads, more queries than keys, fewer, and as many."""
    rng, judge = random.Random(7), Judge()
    for _ in range(16):
        inputs = random_call(rng, dtype, device)
        judge.compare(described(inputs), inputs)
    judge.verdict()


def block_diagonal(length: int, blocks: int) -> torch.Tensor:
    block = torch.arange(length) * blocks // length
    return block[:, None] == block


SPARSE = {
    "blocks": block_diagonal(256, 8),
    "blocks off the tiles": block_diagonal(250, 7),
    "one attended pair to a tile": (torch.arange(200)[:, None] * 32 + 5) % 200 == torch.arange(200),
    "strips that no query of a tile attends to": (torch.arange(192) // 32 % 2 == 0).expand(70, 192),
    "one pair": torch.zeros(130, 190, dtype=torch.bool).index_put(
        (torch.tensor(100), torch.tensor(70)), torch.tensor(True)
    ),
    "nothing": torch.zeros(40, 70, dtype=torch.bool),
    "a mask to each head": torch.stack([block_diagonal(96, 3), torch.rand(96, 96) < 0.5]),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_sparse_masks(device, name, dtype):
    """Tiles in which nothing is attended are skipped; one attended pair is enough to keep a tile."""
    mask, judge = SPARSE[name].to(device), Judge()
    q, k = mask.shape[-2:]
    for bias, is_causal in ((None, False), ((q, k), True)):
        inputs = draw(
            seed=3, dtype=dtype, device=device, batch=(), q=q, k=k, d=16, bias=bias, mask=None, is_causal=is_causal
        )
        judge.compare((name, bias, is_causal), inputs.replace(mask=mask))
    judge.verdict()


# Fewer than 32 units of work: keys (of the forward) and queries (of the backward) are shared out and put together again.
IN_PARTS = {
    "keys, one query": {"q": 1, "k": 1100, "d": 64},
    "keys, three queries": {"q": 3, "k": 1600, "heads": 1, "d": 16},
    "keys, eight queries": {"batch": (1,), "heads": 4, "kv_heads": 1, "q": 2, "k": 1100, "d": 64},
    "keys, a lane to a query": {"batch": (1,), "heads": 2, "q": 20, "k": 1300, "d": 8},
    "keys, bias": {"batch": (1,), "heads": 1, "q": 9, "k": 1100, "d": 8, "bias": (1, 9, 1100)},
    "queries": {"batch": (1,), "heads": 1, "q": 600, "k": 40, "d": 8},
    "queries, bias": {"batch": (), "heads": 1, "q": 600, "k": 90, "d": 8, "bias": (1, 600, 90)},
    "queries, bias of keys": {"batch": (), "heads": 1, "q": 600, "k": 90, "d": 8, "bias": (1, 90)},
    "queries, bias of all heads": {"batch": (), "heads": 4, "kv_heads": 1, "q": 130, "k": 90, "d": 8, "bias": (1, 130, 90)},
    "both": {"batch": (), "heads": 2, "kv_heads": 1, "q": 140, "k": 1100, "d": 8, "masked_rows": "mean"},
}
SEEN = {
    "all": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 40},
    "lengths": {"key_lengths": 700},  # of the first entry; 3 of the others: whole parts see nothing
}


def in_parts(call: str, seen: str, dtype: torch.dtype, device: str) -> Inputs:
    changes = {**{"bias": None, "mask": None}, **IN_PARTS[call], **SEEN[seen]}
    if "key_lengths" in changes:
        lengths = torch.full(changes.get("batch", (2,)), 3)
        lengths.view(-1)[0] = changes["key_lengths"] if changes["k"] > 1000 else 30
        changes["key_lengths"] = lengths
    return draw(seed=5, dtype=dtype, device=device, **changes)


@pytest.mark.parametrize("call", IN_PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_that_is_shared_out_in_parts(device, dtype, call):
    judge = Judge()
    for seen in SEEN:
        judge.compare((call, seen), in_parts(call, seen, dtype, device))
    judge.verdict()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", ["-inf", "half the lowest", "-1e9"])
def test_causal_beside_additive_masks(device, dtype, low):
    """Rows whose surviving logits are all far below zero, in bands across the diagonal."""
    judge = Judge()
    lowest = max(torch.finfo(dtype).min / 2, -1e150)  # whose square, in the test's own sums, is finite
    number = {"-inf": -torch.inf, "half the lowest": lowest, "-1e9": max(-1e9, lowest)}[low]
    for q, k in ((3, 3), (1, 40), (33, 70), (70, 33)):
        inputs = draw(seed=4, dtype=dtype, device=device, q=q, k=k, bias=(2, 1, q, k), mask=None, is_causal=True)
        inputs.bias.masked_fill_((torch.arange(q)[:, None] + torch.arange(k)) % 7 < 4, number)
        inputs.bias[0, 0, q // 2] = number
        judge.compare((q, k, low), inputs)
        judge.compare((q, k, low, "window"), inputs.replace(window=3))
    judge.verdict()


@pytest.mark.parametrize("masked_rows", POLICIES)
@pytest.mark.parametrize("q", [2, 40])
def test_rows_that_see_nothing(device, q, masked_rows):
    """Before the first key, and behind a window that lies beyond the length: exact values, and gradients that are zero."""
    k = q // 2
    inputs = draw(seed=6, device=device, batch=(2,), q=q, k=k, bias=(2, q, k), mask=None, masked_rows=masked_rows)
    inputs = inputs.replace(is_causal=True, window=1, key_lengths=torch.tensor([k, 0], device=device), gate=None)
    results = evaluate(gated_attention_with_lse, inputs)
    mean = inputs.value.double().mean(-2, keepdim=True) if masked_rows == "mean" else torch.zeros(())
    dead = (slice(None), slice(None), slice(0, q - k))
    expected = mean.expand(2, 2, q - k, -1) if masked_rows == "mean" else torch.zeros(2, 2, q - k, 8)
    torch.testing.assert_close(results["out"][dead].double(), expected.double(), rtol=1e-6, atol=1e-7)
    assert results["lse"][dead].eq(-torch.inf).all()
    assert results["lse"][1].eq(-torch.inf).all(), "the second entry has no keys"
    assert results["d_query"][dead].eq(0).all()
    assert results["d_key"][1].eq(0).all()
    assert results["d_bias"][:, : q - k].eq(0).all()
    own = results["out"][0, :, q - k :]
    assert torch.equal(own, inputs.value[0]), "a window of one key gives that key's value"


def test_definition_in_loops(device):
    """By the sentences of the documentation alone: no matrix, no mask."""
    q, k = 4, 6
    inputs = draw(seed=8, dtype=torch.float64, device=device, batch=(2,), heads=1, q=q, k=k, bias=None, mask=None)
    inputs = inputs.replace(is_causal=True, window=3, key_lengths=torch.tensor([4, 6], device=device), gate=None)
    out, lse = gated_attention_with_lse(*inputs.tensors, **inputs.options)
    for b, length in enumerate((4, 6)):
        for i in range(q):
            position = k - q + i  # of six keys the four queries stand at 2, 3, 4, 5
            seen = [j for j in range(k) if j <= position and j > position - 3 and j < length]
            logits = torch.stack([inputs.query[b, 0, i] @ inputs.key[b, 0, j] / 8**0.5 for j in seen])
            expected = sum(p * inputs.value[b, 0, j] for p, j in zip(logits.softmax(0), seen, strict=True))
            torch.testing.assert_close(out[b, 0, i], expected)
            torch.testing.assert_close(lse[b, 0, i], logits.logsumexp(0))
