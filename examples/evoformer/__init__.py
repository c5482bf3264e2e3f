# SPDX-License-Identifier: BSD-3-Clause
"""A small Evoformer trained on a real protein family; run it with ../evoformer_demo.py."""
