# SPDX-License-Identifier: BSD-3-Clause
"""Triangle attention around the starting node, Jumper et al. 2021, supplementary algorithm 13."""

from canvas import Picture

KEYS, QUERIES, CELL, STEP = 7, 6, 17, 19
CARDS = 484  # left edge of the first row
MASKED = 2  # keys at the end, which are padding


def draw() -> Picture:
    picture = Picture(
        960,
        430,
        "Triangle attention",
        "Edge ij of a protein's residues attends to the edges ik. The bias comes from the third side jk and is "
        "the same for every i. Masked keys are left out, and a gate scales the result.",
    )
    _triangle(picture)
    _bias(picture)
    for row in (2, 1, 0):
        _row(picture, CARDS + 30 * row, 152 - 34 * row, front=row == 0)
    _result(picture)
    picture.text(24, 398, "Yellow: the scores of all rows, [rows, heads, j, k]. They are never whole in memory:", 13)
    picture.text(24, 417, "one pass over the keys computes bias, mask, softmax and gate, forward and backward.", 13)
    return picture


def _triangle(picture: Picture) -> None:
    i, j, k = (48, 262), (138, 112), (228, 262)
    picture.text(24, 34, "Three residues", 15, bold=True)
    picture.text(24, 54, "An edge looks at its neighbours", 12, "soft")
    picture.line([j, k], "bias", 5)
    picture.line([i, k], "key", 5)
    picture.line([i, j], "query", 5)
    for (x, y), name in ((i, "i"), (j, "j"), (k, "k")):
        picture.dot(x, y, 15, "plain")
        picture.text(x, y + 5, name, 15, anchor="middle", bold=True)
    picture.text(80, 166, "query", 13, "query-ink", "end", bold=True)
    picture.text(80, 184, "from z_{ij}", 13, "query-ink", "end")
    picture.text(138, 292, "key, value from z_{ik}", 13, "key-ink", "middle", bold=True)
    picture.text(198, 166, "bias", 13, "bias-ink", bold=True)
    picture.text(198, 184, "from z_{jk}", 13, "bias-ink")
    said = "Edge ij weighs every edge ik.|The third side, jk, adds its bias,|the same for every residue i."
    picture.text(138, 326, said, 12, "soft", "middle")


def _bias(picture: Picture) -> None:
    x, y = 300, 190
    picture.text(x, 34, "One shared bias", 15, bold=True)
    picture.text(x, 54, "read where it lies", 12, "soft")
    picture.grid(x, y, KEYS, QUERIES, CELL, "bias", STEP - CELL)
    picture.text(x + 66, y - 10, "bias [j, k]", 13, "bias-ink", "middle", bold=True)
    picture.text(x + 66, y + 136, "its gradient is the sum|over all rows i", 12, "bias-ink", "middle")
    for row, level in enumerate((y + 57, 135, 101)):
        picture.arrow([(x + 134, y + 57), (456, y + 57), (456, level), (CARDS + 30 * row, level)], "bias", 1.8)


def _row(picture: Picture, x: float, y: float, front: bool) -> None:
    picture.rect(x, y, 182, 182, "ground", 8)
    picture.rect(x, y, 182, 182, "plain", 8)
    if not front:
        return
    left, top = x + 42, y + 50
    picture.text(x + 12, y + 20, "row i", 13, bold=True)
    for key in range(KEYS):
        masked = key >= KEYS - MASKED
        picture.rect(left + key * STEP, top - 22, CELL, CELL, "masked" if masked else "key", 2)
        for query in range(QUERIES):
            picture.rect(left + key * STEP, top + query * STEP, CELL, CELL, "masked" if masked else "score", 2)
    for query in range(QUERIES):
        picture.rect(left - 22, top + query * STEP, CELL, CELL, "query", 2)
    picture.text(left + KEYS * STEP - 2, y + 20, "keys k", 12, "key-ink", "end")
    picture.text(x + 12, y + 50 + 62, "j", 12, "query-ink", "middle")


def _result(picture: Picture) -> None:
    picture.text(CARDS, 34, "Every row i by itself", 15, bold=True)
    picture.text(CARDS, 54, "grey: keys the mask leaves out, padding", 12, "soft")
    x, width = 756, 180
    steps = [
        ("softmax over k", "score"),
        ("weighted sum of the values", "value"),
        ("times sigmoid(gate), from z_{ij}", "gate"),
        ("update of z_{ij}", "query"),
    ]
    for n, (text, color) in enumerate(steps):
        y = 128 + 62 * n
        picture.box(x, y, width, 38, text, color, 12)
        if n:
            picture.arrow([(x + width / 2, y - 24), (x + width / 2, y)], "plain")
    picture.arrow([(CARDS + 182, 320), (CARDS + 256, 320), (CARDS + 256, 147), (x, 147)], "plain")
