# SPDX-License-Identifier: BSD-3-Clause
"""Gated attention with a pair bias for PyTorch: the attention of AlphaFold-like models as one fused operator.

Importing the package loads the compiled operators, `torch.ops.torch_gated_attn.*`.
"""

from __future__ import annotations

import torch

from . import _load, reference
from ._version import __version__
from .explain import Explanation, explain
from .functional import gate_output, gated_attention, gated_attention_with_lse
from .module import GatedAttention

_load.load()

from . import _flops, _vmap  # noqa: E402  # their rules attach to the loaded operators

_flops.register()
_vmap.register()

#: What selective activation checkpointing should keep rather than compute twice:
#: ``checkpoint(..., context_fn=partial(create_selective_checkpoint_contexts, OPS_TO_SAVE))``.
OPS_TO_SAVE = [torch.ops.torch_gated_attn._gated_attention_forward.default]

__all__ = [
    "OPS_TO_SAVE",
    "Explanation",
    "GatedAttention",
    "__version__",
    "explain",
    "gate_output",
    "gated_attention",
    "gated_attention_with_lse",
    "reference",
]
