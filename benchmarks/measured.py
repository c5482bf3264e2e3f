# SPDX-License-Identifier: BSD-3-Clause
"""The files of benchmarks/results, with names for people. Needs the standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
Document = dict[str, Any]

WORKLOADS = {
    "T1": "triangle attention, crop 256",
    "T2": "triangle attention, crop 384",
    "T3": "triangle attention, crop 768",
    "R1": "MSA row attention with pair bias",
    "X1": "extra MSA row attention",
    "C1": "MSA column attention",
    "G1": "global column attention, one query",
    "P1": "template triangle attention",
    "P2": "template pointwise attention",
    "S1": "AlphaFold 3 single attention",
    "D1": "AlphaFold 3 diffusion tokens",
    "A1": "AlphaFold 3 atoms, windows of 32",
    "E1": "ESMFold sequence attention",
    "O1": "odd sizes, padding, fully masked rows",
    "L1": "gated language model, grouped heads",
}
MODELS = {
    "evoformer": "Evoformer block, 64 sequences of {length}",
    "esmfold": "ESMFold's folding trunk, one block, {length} residues",
    "qwen3_next": "Qwen3-Next, two layers, {length} tokens",
}
PATHS = {"operator": "this operator", "eager": "plain PyTorch", "sdpa": "SDPA", "compile": "`torch.compile`"}
# Family and model that a processor reports: the names it reports ("AMD EPYC") leave the generation open.
GENERATIONS = {("6", "207"): "Emerald Rapids", ("25", "17"): "Zen 4"}
INSTRUCTIONS = {"avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "AVX-512 BF16", "default": "portable code"}


def documents() -> list[Document]:
    """Newest first."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda document: document["machine"]["date"], reverse=True)


def having(part: str) -> list[Document]:
    return [document for document in documents() if document.get(part)]


def cpu(machine: Document) -> str:
    name = machine["cpu"].replace("(R)", "").removesuffix(" Processor")
    family, model, _ = machine["cpu_family_model_stepping"]
    generation = GENERATIONS.get((family, model), f"family {family}, model {model}")
    return f"{name} ({generation}, {INSTRUCTIONS[machine['instruction_set']]})"


def day(document: Document) -> str:
    return document["machine"]["date"][:10]


def setting(machine: Document) -> str:
    return f"{cpu(machine)}, {machine['threads']} threads, torch {machine['versions']['torch'].partition('+')[0]}"


def settings_and_days(measured: list[Document]) -> list[str]:
    """One to a machine."""
    days: dict[str, dict[str, None]] = {}
    for document in measured:
        days.setdefault(setting(document["machine"]), {})[day(document)] = None
    return [f"{where}, {' and '.join(found)}" for where, found in days.items()]


def where(document: Document) -> str:
    """The commit, too."""
    commit, dirty, _ = document["machine"]["commit"].partition("-dirty")
    state = " with uncommitted changes" if dirty else ""
    return f"{setting(document['machine'])}, {day(document)}, commit {commit}{state}"


def model_rows() -> list[tuple[Document, Document]]:
    """(document, row): the newest row of each model and processor, in the order of MODELS."""
    newest: dict[tuple[str, str], tuple[Document, Document]] = {}
    for document in having("models"):
        for row in document["models"]:
            newest.setdefault((row["model"], cpu(document["machine"])), (document, row))
    return [pair for name in MODELS for key, pair in newest.items() if key[0] == name]


Rows = dict[tuple[str, str, str], tuple[Document, Document]]


def comparisons() -> list[Rows]:
    """For each processor {(workload, dtype, direction): (document, row)}, most rows first.

    Of the rows of one key those beside `torch.compile` go first, then the newest."""
    pairs = [(document, row) for document in having("comparisons") for row in document["comparisons"]]
    pairs.sort(key=lambda pair: "compile" not in pair[1]["paths"])
    processors: dict[str, Rows] = {}
    for document, row in pairs:
        rows = processors.setdefault(cpu(document["machine"]), {})
        rows.setdefault((row["workload"], row["dtype"], row["direction"]), (document, row))
    return sorted(processors.values(), key=len, reverse=True)
