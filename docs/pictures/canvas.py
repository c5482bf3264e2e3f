# SPDX-License-Identifier: BSD-3-Clause
"""SVG for light and dark pages. One colour means one thing in every picture; see COLORS.
Teams and devices take them in that order.

A picture has its own ground, so that it reads where a page's theme and the reader's system differ. Fonts are the system's:
texts leave room for the widest of the usual ones.
"""

from __future__ import annotations

import re
from html import escape

# name: fill and outline, light; the same, dark
COLORS = {
    "query": ("#cfe4f2", "#0b6e99", "#173f57", "#5cb5de"),
    "key": ("#dfd8f3", "#6752ad", "#382f60", "#ab9aea"),
    "value": ("#d0ead8", "#2c7d54", "#1b4731", "#69c590"),
    "bias": ("#fbe0bf", "#b8651a", "#5c3c1b", "#eda55f"),
    "gate": ("#f8d6e0", "#b0305c", "#5a2539", "#f08bac"),
    "score": ("#f3eeb9", "#857a12", "#494414", "#d8cc5c"),
    "plain": ("#eceff2", "#7b8691", "#2a313a", "#8b96a3"),
    "masked": ("#d5d9de", "#a5adb6", "#3a424c", "#5b6672"),
}
GROUND, INK, SOFT = ("#fcfcfb", "#14181d"), ("#1d2530", "#e8edf2"), ("#59636f", "#a3adb9")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
RAISED = re.compile(r"([_^])\{([^}]*)\}")


def _rules(dark: bool) -> str:
    rules = [f".ground{{fill:{GROUND[dark]}}}", f".ink{{fill:{INK[dark]}}}", f".soft{{fill:{SOFT[dark]}}}"]
    for name, colors in COLORS.items():
        fill, outline = colors[2 * dark : 2 * dark + 2]
        rules += [f".{name}{{fill:{fill};stroke:{outline}}}", f".{name}-ink{{fill:{outline}}}"]
        rules += [f".{name}-line{{fill:none;stroke:{outline}}}"]
    return "".join(rules)


DARK = f"@media (prefers-color-scheme:dark){{{_rules(dark=True)}}}"
STYLE = f"<style>text{{font-family:{FONT}}}{_rules(dark=False)}{DARK}</style>"
Points = list[tuple[float, float]]


def _index(found: re.Match[str], size: float) -> str:
    """Lowered or raised, then back by an empty piece, a space of no width."""
    shift = (0.25 if found[1] == "_" else -0.4) * size
    return f'<tspan dy="{shift:g}" font-size="{0.75 * size:g}">{found[2]}</tspan><tspan dy="{-shift:g}">&#8203;</tspan>'


class Picture:
    """`title` and `description` are for readers who hear it."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.width, self.height = width, height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
            STYLE,
            f'<rect class="ground" width="{width}" height="{height}" rx="10"/>',
        ]

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])

    def rect(self, x: float, y: float, w: float, h: float, color: str, radius: float = 3, dashed: bool = False) -> None:
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" class="{color}"{dashes}/>'
        )

    def text(
        self, x: float, y: float, text: str, size: float = 13, color: str = "ink", anchor: str = "start", bold: bool = False
    ) -> None:
        """`y` is the baseline. `a_{ij}` and `a^{T}` set indices, "a|b" two lines."""
        weight = ' font-weight="600"' if bold else ""
        style = f'font-size="{size:g}" text-anchor="{anchor}" class="{color}"{weight}'
        for line in text.split("|"):
            marked = RAISED.sub(lambda found: _index(found, size), escape(line, quote=False))
            self.parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{marked}</text>')
            y += 1.35 * size

    def box(self, x: float, y: float, w: float, h: float, text: str, color: str = "plain", size: float = 13) -> None:
        """A box with its text in the middle."""
        self.rect(x, y, w, h, color, 6)
        lines = text.count("|") + 1
        first = y + h / 2 + 0.36 * size - (lines - 1) * 0.675 * size
        self.text(x + w / 2, first, text, size, anchor="middle")

    def line(self, points: Points, color: str = "plain", width: float = 1.5, dashed: bool = False) -> None:
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="{path}" class="{color}-line" stroke-width="{width:g}"{dashes}/>')

    def arrow(self, points: Points, color: str = "plain", width: float = 1.5, dashed: bool = False) -> None:
        """Its last piece is horizontal or vertical."""
        (x0, y0), (x, y) = points[-2:]
        length = max(abs(x - x0), abs(y - y0))
        dx, dy = (x - x0) / length, (y - y0) / length
        self.line([*points[:-1], (x - 6 * dx, y - 6 * dy)], color, width, dashed)
        corners = [(x, y), (x - 8 * dx - 4 * dy, y - 8 * dy + 4 * dx), (x - 8 * dx + 4 * dy, y - 8 * dy - 4 * dx)]
        self.parts.append(f'<path d="M{"L".join(f"{a:g} {b:g}" for a, b in corners)}Z" class="{color}-ink"/>')

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{color}"/>')

    def grid(self, x: float, y: float, columns: int, rows: int, cell: float, color: str, gap: float = 2) -> None:
        for row in range(rows):
            for column in range(columns):
                self.rect(x + column * (cell + gap), y + row * (cell + gap), cell, cell, color, 2)
