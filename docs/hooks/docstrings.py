# SPDX-License-Identifier: BSD-3-Clause
"""The docstrings use what PyTorch's do: `.. math::`, `.. code-block::` and :func:`roles`. mkdocstrings wants Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

DIRECTIVE = re.compile(r"^( *)\.\. (math|code-block)::(.*)\n((?:(?:\1 +.*)?\n)*)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|mod|meth):`~?([^`]+)`")


def markdown(text: str) -> str:
    text = DIRECTIVE.sub(_block, text + "\n")
    text = ROLE.sub(r"`\1`", text)
    return re.sub(r"``([^`\n]+)``", r"`\1`", text)


def _block(found: re.Match[str]) -> str:
    indent, kind, argument, body = found[1], found[2], found[3].strip(), textwrap.dedent(found[4]).strip("\n")
    if kind == "code-block":
        return textwrap.indent(f"\n```{argument}\n{body}\n```\n\n", indent)
    formula = "\n".join(filter(None, (argument, body)))
    if r"\\" in formula or "&" in formula:
        formula = f"\\begin{{align*}}\n{formula}\n\\end{{align*}}"
    return textwrap.indent(f"\n$$\n{formula}\n$$\n\n", indent)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
