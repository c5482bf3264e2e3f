# SPDX-License-Identifier: BSD-3-Clause
"""Measuring the operator beside what a PyTorch user would write without it: `python -m torch_gated_attn bench` and the
repository's benchmarks/ share it. Private: names here change without notice."""
