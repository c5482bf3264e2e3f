# SPDX-License-Identifier: BSD-3-Clause
"""mutation/run.py takes long and is run by hand; that its mutants still fit the sources is checked every time."""

from pathlib import Path

from mutation.mutants import outdated


def test_every_mutant_fits_the_sources():
    assert not outdated(Path(__file__).parents[1] / "csrc")
