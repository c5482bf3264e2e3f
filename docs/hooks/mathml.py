# SPDX-License-Identifier: BSD-3-Clause
"""Formulas become MathML when the site is built: no script of another server typesets them in the browser."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    block = found[1] == "div"
    formula = convert(html.unescape(found[2]), display="block" if block else "inline")
    return f'<div class="formula">{formula}</div>' if block else formula
