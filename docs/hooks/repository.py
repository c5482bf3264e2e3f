# SPDX-License-Identifier: BSD-3-Clause
"""Pages link to files of the repository, and show some of them, as they would on its own pages.

A link that leaves docs/ gets a copy of its file in the site, so that `--strict` checks it like any other. `<!-- include
CONTRIBUTING.md -->` stands for that file.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
INCLUDE = re.compile(r"^<!-- include (\S+) -->$", re.MULTILINE)
SHOWN = {".png", ".svg", ".json"}  # browsers show these; other files are copied as text


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite(text: str, base: str) -> str:
        """Links of a text that stands in the folder `base` of the repository."""
        return LINK.sub(lambda link: f"]({_target(link[1], link[2] or '', base, folder, config, files)})", text)

    markdown = rewrite(markdown, posixpath.join("docs", folder))
    return INCLUDE.sub(lambda name: rewrite((ROOT / name[1]).read_text(), ""), markdown)


def _target(link: str, anchor: str, base: str, folder: str, config: MkDocsConfig, files: Files) -> str:
    path = posixpath.normpath(posixpath.join(base, link))
    inside = os.path.relpath(path, "docs")
    if not inside.startswith(".."):
        return posixpath.relpath(inside, folder or ".") + anchor
    if not (ROOT / path).is_file():
        raise PluginError(f"a link must lead to a file, but {link} leads to {path}")
    copy = f"files/{path}" if Path(path).suffix in SHOWN else f"files/{path}.txt"
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
    return posixpath.relpath(copy, folder or ".")
