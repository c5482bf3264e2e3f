# SPDX-License-Identifier: BSD-3-Clause
"""What happens where a tile of keys meets a block of queries: csrc/cpu/forward_block.h, backward_block.h, their units."""

from canvas import Picture

WIDTH, HEIGHT = 158, 58


def draw() -> Picture:
    picture = Picture(
        960,
        560,
        "The walk of a tile, forward and backward",
        "Forward: scores begin as the bias, products with the keys are added, exponentials taken, values added to "
        "the result, which is divided by the sum and gated at the end. Backward: the probabilities again, then "
        "dS, which goes into dBias, dQ, dK and dV.",
    )
    _cover(picture)
    _forward(picture)
    _backward(picture)
    return picture


def _cover(picture: Picture) -> None:
    picture.text(24, 34, "Each tile of 32 keys meets each block of queries", 15, bold=True)
    picture.text(24, 54, "its rows of keys and values stay in the first-level cache meanwhile", 12, "soft")
    for x, color, text in (
        (500, "masked", "empty: skipped"),
        (650, "score", "full: no mask looked at"),
        (810, "plain", "mixed: -inf|where hidden"),
    ):
        picture.box(x, 22, 140 if x < 800 else 126, 40, text, color, 11)


def _chain(picture: Picture, y: float, boxes: list[tuple[str, str]]) -> None:
    for n, (text, color) in enumerate(boxes):
        x = 24 + 189 * n
        picture.box(x, y, WIDTH, HEIGHT, text, color, 12)
        if n:
            picture.arrow([(x - 31, y + HEIGHT / 2), (x, y + HEIGHT / 2)], "plain")


def _forward(picture: Picture) -> None:
    y = 128
    picture.text(24, y - 18, "Forward", 15, "query-ink", bold=True)
    picture.text(104, y - 18, "kept: inputs, result, and two numbers for each query", 12, "soft")
    _chain(
        picture,
        y,
        [
            ("S = bias|table, transposed once", "bias"),
            ("S += Q K^{T}|in registers", "key"),
            ("P = 2^{S - shift}|sum += P", "score"),
            ("O += P V|not yet divided", "value"),
            ("out = O / sum|times sigmoid(gate)", "gate"),
        ],
    )
    x = 24 + 189 * 3 + WIDTH / 2
    picture.line([(x, y + HEIGHT), (x, y + 84), (103, y + 84)], "plain", dashed=True)
    picture.arrow([(103, y + 84), (103, y + HEIGHT)], "plain")
    picture.text(24 + 189 * 2 + 30, y + 103, "next keys of the tile (8 with AVX-512), next tile", 12, "soft", "middle")
    picture.text(24 + 189 * 4 + WIDTH / 2, y + 80, "after the last key,|one store", 12, "soft", "middle")
    picture.text(130, y + 76, "where a sum of P exceeds 1, the shift rises and O is rescaled", 11, "soft")


def _backward(picture: Picture) -> None:
    y = 310
    picture.text(24, y - 18, "Backward", 15, "query-ink", bold=True)
    picture.text(112, y - 18, "begins with dGate, dO = dY sigmoid(gate) / sum and delta, from the kept result", 12, "soft")
    _chain(
        picture,
        y,
        [
            ("S = bias", "bias"),
            ("S += Q K^{T}|the forward's, again", "key"),
            ("P = 2^{S - row_max}|1 / sum is in dO, delta", "score"),
            ("dP = dO V^{T} - delta", "value"),
            ("dS = P dP|element by element", "score"),
        ],
    )
    last = 24 + 189 * 4 + WIDTH / 2
    line, top = y + 88, y + 116
    picture.line([(last, y + HEIGHT), (last, line), (103, line)], "score", 2)
    for n, (text, color, note) in enumerate(
        (
            ("dBias += dS", "bias", "in the second-level cache|over the rows that share it,|stored once"),
            ("dQ += dS K", "query", "stored when the batch|row has met its keys"),
            ("dK += dS^{T} Q", "key", "a whole tile at once,|stored when the batch|row has met its queries"),
            ("dV += P^{T} dO", "value", "as dK, from the P|that the tile kept"),
        )
    ):
        x = 24 + 189 * n
        picture.arrow([(x + WIDTH / 2, line), (x + WIDTH / 2, top)], "score", 2)
        picture.box(x, top, WIDTH, 44, text, color, 13)
        picture.text(x + WIDTH / 2, top + 64, note, 12, "soft", "middle")
    picture.text(last, top + 20, "no [Q, K] tensor,|no division by|the gate", 12, "soft", "middle")
