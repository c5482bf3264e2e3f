# SPDX-License-Identifier: BSD-3-Clause
"""The products of csrc/cpu/micro.h and the softmax of csrc/cpu/forward_block.h."""

from canvas import Picture

LANES, CELL, STEP = 16, 18, 20
KEYS, DIMS = 4, 4  # of 8 keys and of head_dim
X = 300  # of lane 0
QUERIES, SCORES, RESULTS = 92, 222, 352  # tops of the three tables
THIS_KEY, THIS_DIM, VALUE_DIM = 1, 2, 2


def draw() -> Picture:
    picture = Picture(
        960,
        488,
        "A lane is a query",
        "Sixteen queries stand side by side in a vector. One number of a key is broadcast to all of them. Scores, "
        "probabilities and results have a lane for each query, so that the softmax needs nothing of another lane.",
    )
    picture.text(24, 34, "A vector holds 16 queries: lane i is query i", 15, bold=True)
    picture.text(
        24, 54, "float32 with AVX-512; two vectors to a block; keys come 8 at a time, of which 4 are shown", 12, "soft"
    )
    for lane in (0, 1, 2, LANES - 1):
        name = f"i+{lane}" if lane else "i"
        picture.text(X + lane * STEP + CELL / 2, 84, name if lane in (0, LANES - 1) else "", 11, "soft", "middle")
    _table(picture, QUERIES, DIMS, "query", "Q^{T}", "[head_dim][lane]", THIS_DIM)
    _table(picture, SCORES, KEYS, "score", "", "", THIS_KEY)
    _table(picture, RESULTS, DIMS, "value", "", "", VALUE_DIM)
    _operand(picture, SCORES, "key", "keys,|as they lie", (THIS_KEY, THIS_DIM), THIS_KEY)
    _operand(picture, RESULTS, "value", "values,|as they lie", (THIS_KEY, VALUE_DIM), VALUE_DIM)
    _steps(picture)
    said = "A key that is masked for all queries is not in the list of keys: it costs nothing and is never read. "
    picture.text(24, 466, f"{said}No head size is padded.", 13)
    return picture


def _table(picture: Picture, y: float, rows: int, color: str, name: str, shape: str, marked: int | None) -> None:
    picture.grid(X, y, LANES, rows, CELL, color, STEP - CELL)
    if marked is not None:
        picture.rect(X - 3, y + marked * STEP - 3, LANES * STEP + 4, CELL + 6, f"{color}-line", 4)
    if name:
        picture.text(X - 14, y + 34, name, 13, f"{color}-ink", "end", bold=True)
        picture.text(X - 14, y + 52, shape, 12, "soft", "end")


def _operand(picture: Picture, y: float, color: str, name: str, marked: tuple[int, int], to: int) -> None:
    """[key][dimension], in memory's order; the marked number goes to all lanes of a row of the table beside it."""
    left = X - 140
    picture.grid(left, y, DIMS, KEYS, CELL, color, STEP - CELL)
    picture.text(left - 12, y + 30, name, 13, f"{color}-ink", "end", bold=True)
    key, dim = marked
    x, middle, goal = left + dim * STEP, y + key * STEP + CELL / 2, y + to * STEP + CELL / 2
    picture.rect(x, y + key * STEP, CELL, CELL, f"{color}-ink", 2)
    bend = left + DIMS * STEP + 12
    picture.arrow([(x + CELL, middle), (bend, middle), (bend, goal), (X - 5, goal)], color, 2)


def _steps(picture: Picture) -> None:
    x = X + LANES * STEP + 24
    picture.text(x, QUERIES + 14, "transposed once", 12, "query-ink", bold=True)
    picture.text(x, QUERIES + 32, "times scale and log2(e);|every key tile reads them", 12, "soft")
    picture.text(x, SCORES + 4, "S^{T}: a row for each key j", 12, "score-ink", bold=True)
    said = "begins as the bias of j, transposed|once for all rows; then for every d|s_{j} += k_{jd}, broadcast, times q_{d}"
    picture.text(x, SCORES + 22, said, 12, "soft")
    picture.text(x, SCORES + 80, "p_{j} = 2^{s - shift}: no lane|needs another, nor does the sum", 12, "score-ink")
    picture.text(x, RESULTS + 14, "O^{T} [value_dim][lane]", 12, "value-ink", bold=True)
    picture.text(x, RESULTS + 32, "o_{d} += v_{jd}, broadcast, times p_{j}", 12, "soft")
    picture.text(x, RESULTS + 50, "in the end: over the sum, gated,|transposed back and stored once", 12, "soft")
    for y in (QUERIES + DIMS * STEP, SCORES + KEYS * STEP):
        picture.arrow([(X + 160, y + 4), (X + 160, y + 44)], "plain", 2)
