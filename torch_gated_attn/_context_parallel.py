# SPDX-License-Identifier: BSD-3-Clause
"""Refuses calls inside PyTorch's `context_parallel()`, which would see the keys of one process and be wrong without a word.

It splits buffers in place and replaces `scaled_dot_product_attention` alone, by a function of its own, and that is how to
know of it.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def refuse() -> None:
    if torch.compiler.is_compiling():  # what is traced inside it has been called, or it is traced outside
        return
    if str(functional.scaled_dot_product_attention.__module__).startswith("torch.distributed."):
        raise RuntimeError(
            "gated_attention must not be called inside context_parallel(), which shows it only the keys of this process: "
            "use torch_gated_attn.distributed.ring_gated_attention"
        )
