# SPDX-License-Identifier: BSD-3-Clause
"""The operator inside models that people run: OpenFold, OpenFold-3, IntelliFold, Boltz, Protenix, Foundry (RosettaFold-3),
alphafold3-pytorch, ESMFold, Qwen3-Next, Qwen3.5.

    from torch_gated_attn.integrations import patch, patched, unpatch

    print(patch(model, dry_run=True))   # what would be replaced, and what not and why
    patch(model)                        # weights untouched; training and evaluation
    unpatch(model)

The packages of these models are never imported here: their classes are known by name and interface. `functions` has the
signatures of other kernels, and `register_transformers` offers the operator to every transformers model.
"""

from ._patch import patch, patched, unpatch
from ._report import Module, Report

__all__ = ["Module", "Report", "patch", "patched", "unpatch"]
