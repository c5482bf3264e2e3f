# SPDX-License-Identifier: BSD-3-Clause
"""What each device holds: docs/distributed.md and examples/axial_parallelism.py."""

from canvas import Picture

COLORS = ("query", "key", "value", "gate")
SIZE, STEP = 208, 52


def draw() -> Picture:
    picture = Picture(
        960,
        440,
        "Shards of the pair representation on four devices",
        "Axial: each device holds rows around the starting node and columns around the ending node; one "
        "all_to_all turns them in between. Grid: each device holds a tile, and keys and values travel in a ring.",
    )
    picture.text(24, 34, "Dynamic axial parallelism", 15, bold=True)
    picture.text(24, 54, "pair [B, N, N, C] on devices 0 to 3", 12, "soft")
    _stripes(picture, 24, rows=True)
    _turn(picture)
    _stripes(picture, 348, rows=False)
    _grid(picture, 680)
    return picture


def _frame(picture: Picture, x: float, name: str, placement: str) -> None:
    picture.text(x, 90, name, 13, bold=True)
    picture.text(x, 108, placement, 12, "soft")


def _stripes(picture: Picture, x: float, rows: bool) -> None:
    _frame(
        picture,
        x,
        "starting node" if rows else "ending node",
        "rows split, Shard(1)" if rows else "columns split, Shard(2)",
    )
    for device, color in enumerate(COLORS):
        for part in range(4):  # what a device keeps in the turn is its own tile of both
            a, b = (part, device) if rows else (device, part)
            picture.rect(x + STEP * a, 120 + STEP * b, STEP - 2, STEP - 2, color, 2, dashed=part != device)
        left, top = (3, device) if rows else (device, 3)
        picture.text(x + STEP * left + 25, 151 + STEP * top, f"{device}", 15, anchor="middle", bold=True)
    said = (
        "each row needs its own|pairs only, and the whole|bias: H of C channels,|gathered"
        if rows
        else "the same, transposed;|stays so: the next block|may begin here"
    )
    picture.text(x, 352, said, 12, "soft")


def _turn(picture: Picture) -> None:
    picture.arrow([(244, 224), (336, 224)], "plain", 2.5)
    picture.text(290, 196, "all_to_all", 13, anchor="middle", bold=True)
    picture.text(290, 214, "one turn", 12, "soft", "middle")
    picture.text(290, 250, "solid tiles|stay, the|dashed|are sent", 12, "soft", "middle")


def _grid(picture: Picture, x: float) -> None:
    picture.text(x, 34, "Grid of tiles, with a ring", 15, bold=True)
    picture.text(x, 54, "where a whole bias does not fit", 12, "soft")
    _frame(picture, x, "both nodes", "rows and columns split, never turned")
    half = 2 * STEP
    for device, color in enumerate(COLORS):
        a, b = x + half * (device % 2), 120 + half * (device // 2)
        picture.rect(a, b, half - 2, half - 2, color, 2)
        picture.text(a + 16, b + 26, f"{device}", 15, anchor="middle", bold=True)
    for b in (120, 120 + half):
        picture.arrow([(x + 62, b + 44), (x + half + 40, b + 44)], "bias", 2)
        picture.arrow([(x + half + 40, b + 64), (x + 62, b + 64)], "bias", 2)
        picture.text(x + half, b + 88, "keys, values", 12, "bias-ink", "middle")
    said = (
        "starting node: a ring along each row|of tiles; ending node: along each|column. "
        "Of the bias each device|holds its queries, all keys."
    )
    picture.text(x, 352, said, 12, "soft")
