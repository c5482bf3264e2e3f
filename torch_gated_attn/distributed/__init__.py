# SPDX-License-Identifier: BSD-3-Clause
"""The operator over several devices, as part of torch.distributed.

It is imported by name, ``import torch_gated_attn.distributed``, never by ``import torch_gated_attn``. Importing it
registers DTensor's sharding strategies, so that `gated_attention`, `gate_output` and the modules take DTensors whose batch
dimensions, heads or queries are split; and the operators for keys that are split.

Raises ImportError where the installed torch has no DTensor that it knows.
"""

from __future__ import annotations

import torch.distributed

import torch_gated_attn as _loaded  # noqa: F401  # the operators whose strategies these are

if not torch.distributed.is_available():
    raise ImportError("torch_gated_attn.distributed needs torch.distributed, but this torch was built without it")

from . import _registration
from ._functions import ring_gated_attention, split_key_attention

_registration.register()

__all__ = ["ring_gated_attention", "split_key_attention"]
