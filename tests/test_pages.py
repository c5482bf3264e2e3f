# SPDX-License-Identifier: BSD-3-Clause
"""What README and docs/ show is what was measured, and the pictures are those that docs/pictures draws."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from pages import ROOT

TABLES = ROOT / "benchmarks/tables.py"
PICTURES = sorted((ROOT / "docs/assets").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


def in_a_copy(folder: Path) -> Path:
    """What the scripts read and write, where a test may change it: they find everything beside themselves."""
    for name in ("benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    return folder


def run(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=60, check=False)


def test_pages_say_what_was_measured():
    done = run(TABLES, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_says_otherwise_is_noticed_and_written_again(tmp_path):
    copy = in_a_copy(tmp_path)
    page = copy / "docs/performance.md"
    right = page.read_text()
    page.write_text(re.sub(r"\d+ MiB", "1 MiB", right, count=1))
    assert page.read_text() != right
    done = run(copy / "benchmarks/tables.py", "--check")
    assert done.returncode == 1
    assert done.stdout == "docs/performance.md differs from benchmarks/results\n"
    assert run(copy / "benchmarks/tables.py").returncode == 0
    assert page.read_text() == right


def test_a_table_that_nobody_makes_is_named(tmp_path):
    copy = in_a_copy(tmp_path)
    with (copy / "README.md").open("a") as page:
        page.write("<!-- table: weather -->\n<!-- end of table -->\n")
    done = run(copy / "benchmarks/tables.py")
    assert done.returncode == 1
    assert "but a page names weather" in done.stderr


def test_pictures_are_those_that_are_drawn(tmp_path):
    copy = in_a_copy(tmp_path)
    for picture in (copy / "docs/assets").glob("*.svg"):
        picture.unlink()
    for script in ("docs/pictures", "benchmarks/tables.py"):
        done = run(copy / script)
        assert done.returncode == 0, done.stderr
    drawn = {path.name: path.read_text() for path in (copy / "docs/assets").glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in PICTURES}


def test_every_picture_is_on_a_page():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert [path.name for path in PICTURES if f"assets/{path.name})" not in text] == []


def advance(character: str) -> float:
    """Of the widest of the usual system fonts, DejaVu Sans, in units of its size; rounded up."""
    for width, characters in ((0, "\u200b"), (0.4, " .,:;'|ijlftr()[]I"), (1, "mwMW")):
        if character in characters:
            return width
    return 0.75 if character.isupper() else 0.64


def extent(text: ElementTree.Element) -> Box:
    size, x, y = (float(text.attrib[name]) for name in ("font-size", "x", "y"))
    width = size * sum(map(advance, "".join(text.itertext()))) * (1.08 if "font-weight" in text.attrib else 1)
    left = x - {"start": 0, "middle": width / 2, "end": width}[text.attrib["text-anchor"]]
    return left, y - 0.75 * size, left + width, y + 0.2 * size


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_texts_of_a_picture_stand_inside_it_and_apart(picture):
    root = ElementTree.parse(picture).getroot()
    assert root.find(f"{SVG}title").text
    assert root.find(f"{SVG}desc").text
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = [("".join(text.itertext()), extent(text)) for text in root.iter(f"{SVG}text")]
    outside = [name for name, (x0, y0, x1, y1) in boxes if x0 < 0 or y0 < 0 or x1 > width or y1 > height]
    assert not outside
    together = [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if overlap(box, other)]
    assert not together
