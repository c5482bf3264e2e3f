# SPDX-License-Identifier: BSD-3-Clause
"""Writes what was measured into the pages: tables between marks, and the plot of the README.

    python benchmarks/tables.py           # or `make pages`, which draws the pictures of docs/pictures too
    python benchmarks/tables.py --check   # writes nothing; exit code 1 if a page says other than benchmarks/results

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import speed_picture
from measured import MODELS, PATHS, ROOT, WORKLOADS, Document, Rows, comparisons, day, having, model_rows, where

PLOT = "docs/assets/measured.svg"
SECTION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
DIRECTIONS = ("forward", "forward+backward")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def mib(before: float, after: float) -> str:
    return f"{before:.0f} to {after:.0f}&nbsp;MiB"


def length_of_time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f}&nbsp;s" if milliseconds >= 1e3 else f"{milliseconds:.0f}&nbsp;ms"


def name_of(row: Document) -> str:
    return MODELS[row["model"]].format(length=row["length"])


def epoch() -> str:
    """Structure models alone, the newest row of each: for readers who train those."""
    newest = {row["model"]: (document, row) for document, row in reversed(model_rows())}
    chosen = [newest[name] for name in MODELS if name in newest and name != "qwen3_next"]
    rows = []
    for _, row in chosen:
        before, after = row["original"], row["replaced"]
        times = before["milliseconds"], after["milliseconds"]
        hours = f"{10 * times[1] / times[0]:.1f} hours"
        peaks = mib(before["peak_mib"], after["peak_mib"])
        rows.append([name_of(row), " to ".join(map(length_of_time, times)), hours, peaks])
    head = ["a training step of", "time", "an epoch of ten hours takes", "peak memory"]
    places: dict[str, list[str]] = {}
    for document, row in chosen:
        places.setdefault(where(document), []).append(name_of(row))
    notes = [f"{' and '.join(names)}: {place}" if len(places) > 1 else place for place, names in places.items()]
    return f"{table(head, rows)}\n\n{'. '.join(notes)}."


def models() -> str:
    rows = []
    for document, row in model_rows():
        before, after = row["original"], row["replaced"]
        times = before["milliseconds"], after["milliseconds"]
        peaks = mib(before["peak_mib"], after["peak_mib"])
        cells = [name_of(row), *map(length_of_time, times), f"{times[0] / times[1]:.2f}", peaks]
        rows.append([*cells, f"{document['machine']['cpu'].split('(')[0].split()[0]}, {day(document)}"])
    notes = dict.fromkeys(where(document) for document, _ in model_rows())
    head = ["a training step of", "original", "patched", "original / patched", "peak memory", "measured on"]
    return "\n\n".join([table(head, rows), *(f"{note}." for note in notes)])


def speed() -> str:
    return "\n\n".join(map(_speed, comparisons()))


def _speed(chosen: Rows) -> str:
    def cell(workload: str, dtype: str) -> str:
        found = [chosen[key][1] for direction in DIRECTIONS if (key := (workload, dtype, direction)) in chosen]
        ratios = [f"{row['ratio_min']:.1f}{'' if 'compile' in row['paths'] else '*'}" for row in found]
        return " / ".join(ratios) or "not measured"

    dtypes = "float32", "bfloat16"
    measured = {workload for workload, _, _ in chosen}
    rows = [
        [title, code, *(cell(code, dtype) for dtype in dtypes)] for code, title in WORKLOADS.items() if code in measured
    ]
    listed = "\n".join(f"- {note}" for note in dict.fromkeys(where(document) for document, _ in chosen.values()))
    return f"{table(['', 'code', *dtypes], rows)}\n\n{listed}"


def shares() -> str:
    document = having("shares")[0]
    found = {(s["dtype"], s["head_dim"], s["direction"]): s["share"] for s in document["shares"]}
    dims = sorted({head_dim for _, head_dim, _ in found})
    pairs = dict.fromkeys((dtype, direction) for dtype, _, direction in found)
    rows = [
        [f"{dtype}, {direction}", *(f"{100 * found[dtype, head_dim, direction]:.0f} %" for head_dim in dims)]
        for dtype, direction in pairs
    ]
    return f"{table(['', *(f'head_dim {d}' for d in dims)], rows)}\n\n{where(document)}."


def memory() -> str:
    document = having("memory_mib")[0]
    memory = document["memory_mib"]
    rows = [["result and gradients, which nothing can avoid", f"{memory['needed']:.0f} MiB", "1"]]
    for path, used in memory["paths"].items():
        rows.append([PATHS[path], f"{used:.0f} MiB", f"{used / memory['needed']:.2f}"])
    title = f"{WORKLOADS[memory['workload']]}, {memory['dtype']} ({memory['shape']})"
    return f"{table([title, 'peak', 'over the first'], rows)}\n\n{where(document)}."


def attended() -> str:
    document = having("causal")[0]
    both: dict[tuple[str, str], list[str]] = {}
    for row in document["causal"]:
        both.setdefault((row["shape"], row["dtype"]), []).append(f"{row['sdpa'] / row['operator']:.1f}")
    dtypes = list(dict.fromkeys(row["dtype"] for row in document["causal"]))
    shapes = list(dict.fromkeys(row["shape"] for row in document["causal"]))
    rows = [[shape, *(" / ".join(both[shape, dtype]) for dtype in dtypes)] for shape in shapes]
    return f"{table(['batch, heads, key heads, length, head_dim', *dtypes], rows)}\n\n{where(document)}."


def hidden() -> str:
    document = having("share_of_full")[0]
    shares: dict[tuple[str, str], list[str]] = {}
    for row in document["share_of_full"]:
        shares.setdefault((row["case"], str(row["length"])), []).append(f"{row['few'] / row['full']:.2f}")
    rows = [[f"{case}, length {length}", *cells] for (case, length), cells in shares.items()]
    growth = [f"{row['8192'] / row['4096']:.2f}" for row in document["window"]]
    rows.append(["window of 512, length 8192, over the same at length 4096", *growth])
    return f"{table(['time over that of full attention', *DIRECTIONS], rows)}\n\n{where(document)}."


def decoding() -> str:
    document = having("decoding")[0]
    rows = []
    for row in document["decoding"]:
        b, _, kv_heads, keys, head_dim = map(int, row["shape"].split(", "))
        read = 2 * 4 * b * kv_heads * keys * head_dim  # float32 keys and values
        rates = [f"{read / row[path] / 1e9:.0f} GB/s" for path in ("operator", "sum")]
        rows.append([row["shape"], f"{row['sdpa'] / row['operator']:.1f}", *rates])
    head = ["batch, heads, key heads, keys, head_dim", "times faster than SDPA", "reads", "summing reads"]
    return f"{table(head, rows)}\n\n{where(document)}."


def errors() -> str:
    document = having("ratios")[0]
    ratios = document["ratios"]
    names = {"lse32": "lse, plain PyTorch in float32"}
    rows = []
    for output in next(iter(ratios.values())):
        found = [by_output[output] for by_output in ratios.values()]
        name = names.get(output, output.replace("d_", "gradient of "))
        rows.append([name, *(f"{statistics.median(ratio):.2f} / {max(ratio):.2f}" for ratio in found)])
    return f"{table(['', *ratios], rows)}\n\n{where(document)}."


def times() -> str:
    parts = []
    for document in having("comparisons"):
        rows = document["comparisons"]
        paths = list(dict.fromkeys(path for row in rows for path in row["paths"]))
        lines = []
        for row in rows:
            found = [row["paths"].get(path, {}).get("min") for path in paths]
            cells = ["failed" if time is None else f"{1e3 * time:.2f}" for time in found]
            lines.append([WORKLOADS[row["workload"]], row["dtype"], row["direction"], *cells, f"{row['ratio_min']:.1f}"])
        head = ["ms", "dtype", "direction", *(PATHS[path] for path in paths), "times faster"]
        parts.append(f"{where(document)}:\n\n{table(head, lines)}")
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f for f in (epoch, models, speed, shares, memory, attended, hidden, decoding, errors, times)
}


def written(page: str) -> str:
    """The page with its tables as the results have them."""

    def section(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise SystemExit(f"a table must be one of {', '.join(TABLES)}, but a page names {found[2]}")
        return f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}"

    return SECTION.sub(section, page)


def outputs() -> dict[Path, str]:
    """Every file with something measured, and what it should say."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {page: written(page.read_text()) for page in pages if SECTION.search(page.read_text())} | {
        ROOT / PLOT: speed_picture.draw()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, report what differs")
    check = parser.parse_args().check
    differing = [path for path, text in outputs().items() if not path.exists() or path.read_text() != text]
    for path in differing:
        print(f"{path.relative_to(ROOT)} {'differs from' if check else 'written from'} benchmarks/results")
    if check:
        sys.exit(bool(differing))
    for path, text in outputs().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
