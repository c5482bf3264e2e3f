# SPDX-License-Identifier: BSD-3-Clause
"""Gated attention with a pair bias for PyTorch: the attention of AlphaFold-like models as one fused operator.

Importing the package loads the compiled operators, `torch.ops.torch_gated_attn.*`.
"""

from __future__ import annotations

from . import _load, reference
from ._version import __version__
from .explain import Explanation, explain
from .functional import gated_attention, gated_attention_with_lse
from .module import GatedAttention

_load.load()

from . import _vmap  # noqa: E402  # its rules attach to the loaded operators

_vmap.register()

__all__ = [
    "Explanation",
    "GatedAttention",
    "__version__",
    "explain",
    "gated_attention",
    "gated_attention_with_lse",
    "reference",
]
