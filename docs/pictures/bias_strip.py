# SPDX-License-Identifier: BSD-3-Clause
"""dBias in shared memory, and the teams of warps that add to it: csrc/cuda/backward_query.cuh."""

from canvas import Picture

TEAMS, TILES = 4, 6
COLORS = ("query", "key", "value", "gate")
CELL, STEP = 40, 44
X, Y = 520, 118  # of the first step at the first tile


def draw() -> Picture:
    picture = Picture(
        960,
        450,
        "The strip of dBias and its teams",
        "A block owns 64 queries of one head and keeps their dBias over all keys in shared memory. Four teams of "
        "warps work on different batch rows. At step s team t is at tile s + t, so no two teams touch the same "
        "part between two barriers.",
    )
    _block(picture)
    _steps(picture)
    return picture


def _block(picture: Picture) -> None:
    picture.text(24, 34, "A block: 64 queries of one head, all keys", 15, bold=True)
    picture.text(24, 54, "batch rows that share the bias, one or two to a team", 12, "soft")
    for team in range(TEAMS):
        y = 84 + 46 * team
        rows = f"team {team}: batch row r + {team}" if team else "team 0: batch row r"
        picture.box(24, y, 168, 36, rows, COLORS[team], 12)
        picture.text(204, y + 15, "Q, dO, dQ in registers;", 11.5, "soft")
        picture.text(204, y + 31, "K, V tiles flow through", 11.5, "soft")
        picture.line([(348, y + 18), (372, y + 18)], COLORS[team], 2)
    picture.line([(372, 102), (372, 280)], "plain")
    picture.arrow([(372, 280), (372, 304)], "plain")
    picture.line([(24, 306), (404, 306)], "bias", 3)
    picture.text(24, 296, "strip of dBias, float32, shared memory", 12, "bias-ink", bold=True)
    for tile in range(TILES):
        picture.rect(24 + 64 * tile, 312, 60, 44, "bias", 3)
        picture.text(54 + 64 * tile, 338, f"tile {tile}", 12, anchor="middle")
    picture.text(24, 378, "[64 queries][keys]: up to 640 keys on sm_90, 384 on sm_80.", 12, "soft")
    said = (
        "Stored once, when all rows of the block's chunk have passed; the|chunks' partial sums are added in a fixed order."
    )
    picture.text(24, 398, said, 12, "soft")


def _steps(picture: Picture) -> None:
    picture.text(X - 60, 34, "The teams walk one tile behind the other", 15, bold=True)
    picture.text(X - 60, 54, "at step s team t is at tile (s + t) mod 6", 12, "soft")
    for tile in range(TILES):
        picture.text(X + tile * STEP + CELL / 2, Y - 12, f"{tile}", 12, "soft", "middle")
    picture.text(X - 10, Y - 12, "tile", 12, "soft", "end")
    for step in range(TILES):
        y = Y + step * STEP
        picture.text(X - 10, y + 25, f"step {step}", 12, "soft", "end")
        owner = {(step + team) % TILES: team for team in range(TEAMS)}
        for tile in range(TILES):
            x = X + tile * STEP
            if tile in owner:
                picture.box(x, y, CELL, CELL, f"{owner[tile]}", COLORS[owner[tile]], 14)
            else:
                picture.rect(x, y, CELL, CELL, "plain", 6, dashed=True)
        if step:
            picture.line([(X - 4, y - 2), (X + TILES * STEP, y - 2)], "bias", 1.5, dashed=True)
    x = X + TILES * STEP + 12
    picture.text(x, Y + 40, "dashed: a barrier.", 12, "bias-ink")
    picture.text(x, Y + 62, "Between two of them|no two teams are at|one tile: no atomics.", 12, "soft")
    picture.text(x, Y + 128, "A team reads the bias|that the team one|ahead has brought|into L1.", 12, "soft")
    picture.text(x, Y + 212, "Every sum has one|order: the same|bits in every run.", 12, "soft")
    picture.text(X - 60, 416, "Four teams up to head_dim 32, two above. Where the strip does", 12, "soft")
    picture.text(X - 60, 433, "not fit, dBias has a kernel of its own.", 12, "soft")
