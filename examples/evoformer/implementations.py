# SPDX-License-Identifier: BSD-3-Clause
"""The two attentions that the demo compares."""

from __future__ import annotations

from functools import partial

from torch_gated_attn import GatedAttention

from .attention import PlainAttention
from .model import AttentionFactory

IMPLEMENTATIONS: dict[str, AttentionFactory] = {
    "plain": PlainAttention,
    # AlphaFold starts the output projection at zero; then nothing before it would have a gradient to compare at step 1.
    "operator": partial(GatedAttention, zero_init=False),
}
