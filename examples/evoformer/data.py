# SPDX-License-Identifier: BSD-3-Clause
"""The protein kinase seed alignment of Pfam as masked-residue examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
GAP, MASKED = len(RESIDUES), len(RESIDUES) + 1
NUM_TOKENS = len(RESIDUES) + 2
IGNORE = -100  # the label that cross_entropy skips

ALIGNMENT = Path(__file__).resolve().parent.parent / "data" / "Pkinase.sto"
HELD_OUT = 6  # sequences never trained on; 32 of the 38 remain
MASK_RATE = 0.15  # as in AlphaFold's and BERT's masked prediction


@dataclass
class Example:
    """A crop of the alignment; row 0 is the target, whose residues are the columns."""

    tokens: Tensor  # [S, L] int64, some residues replaced by MASKED
    labels: Tensor  # [S, L] int64, the residues to predict, IGNORE elsewhere
    live: Tensor  # [S, L] bool, False in rows and columns that only fill up the crop


def read_stockholm(path: Path) -> dict[str, str]:
    sequences: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "//")):
            name, aligned = line.split()
            sequences[name] = sequences.get(name, "") + aligned
    return sequences


def load_family(path: Path = ALIGNMENT, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Training and held-out sequences as tokens, [38 - HELD_OUT, columns] and [HELD_OUT, columns]."""
    code = {residue: i for i, residue in enumerate(RESIDUES)} | {".": GAP, "-": GAP}
    rows = torch.tensor([[code[c] for c in s.upper()] for s in read_stockholm(path).values()])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[HELD_OUT:]], rows[order[:HELD_OUT]]


def make_example(rows: Tensor, depth: int, columns: int, generator: torch.Generator, predict: slice) -> Example:
    """Crop `rows` to `columns` consecutive residues of rows[0], fill up to `depth` rows, hide residues of rows[predict]."""
    rows = rows[:, rows[0] != GAP]
    start = int(torch.randint(max(1, rows.size(1) - columns + 1), (1,), generator=generator))
    rows = rows[:, start : start + columns]

    tokens = torch.full((depth, columns), GAP)
    live = torch.zeros(depth, columns, dtype=torch.bool)
    tokens[: rows.size(0), : rows.size(1)] = rows
    live[: rows.size(0), : rows.size(1)] = True

    eligible = torch.zeros_like(live)
    eligible[predict] = live[predict] & (tokens[predict] != GAP)
    hidden = eligible & (torch.rand(live.shape, generator=generator) < MASK_RATE)
    labels = tokens.masked_fill(~hidden, IGNORE)
    return Example(tokens.masked_fill(hidden, MASKED), labels, live)


def training_example(train: Tensor, step: int, columns: int, seed: int = 0) -> Example:
    """The example of one step, the same for every run: a random target over 24 to 32 of the training sequences."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)  # a prime, so that seeds share no steps
    size = int(torch.randint(len(train) * 3 // 4, len(train) + 1, (1,), generator=generator))
    rows = train[torch.randperm(len(train), generator=generator)[:size]]
    return make_example(rows, len(train), columns, generator, slice(None))


def held_out_examples(train: Tensor, held_out: Tensor, columns: int, seed: int = 0) -> list[Example]:
    """One example per held-out sequence as the target; only residues of held-out sequences are hidden."""
    generator = torch.Generator().manual_seed(seed)
    context = train[: len(train) - len(held_out)]
    examples = []
    for i in range(len(held_out)):
        rows = torch.cat([held_out.roll(-i, 0), context])
        examples.append(make_example(rows, len(rows), columns, generator, slice(len(held_out))))
    return examples


def majority_accuracy(examples: list[Example]) -> float:
    """What a predictor scores that answers with the most common visible residue of each column."""
    right = asked = 0
    for example in examples:
        counts = torch.nn.functional.one_hot(example.tokens, NUM_TOKENS).sum(0)[:, :GAP]  # [L, 20]
        guess = counts.argmax(-1).expand_as(example.labels)
        known = example.labels != IGNORE
        right += int((guess == example.labels)[known].sum())
        asked += int(known.sum())
    return right / asked
