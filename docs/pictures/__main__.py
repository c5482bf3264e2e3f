# SPDX-License-Identifier: BSD-3-Clause
"""Draws the pictures of the pages into docs/assets: `python docs/pictures`, or `make pages`."""

from __future__ import annotations

from pathlib import Path

import axial_shards
import bias_strip
import lanes
import route
import tile_walk
import triangle_attention
from canvas import Picture

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PICTURES = (triangle_attention, lanes, tile_walk, bias_strip, route, axial_shards)


def pictures() -> dict[Path, Picture]:
    return {ASSETS / f"{module.__name__.replace('_', '-')}.svg": module.draw() for module in PICTURES}


if __name__ == "__main__":
    for path, picture in pictures().items():
        path.write_text(picture.svg())
        print(path.relative_to(ASSETS.parents[1]))
