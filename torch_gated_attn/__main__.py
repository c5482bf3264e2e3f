# SPDX-License-Identifier: BSD-3-Clause
"""`python -m torch_gated_attn`: see `torch_gated_attn.cli`."""

from __future__ import annotations

from .cli import main

raise SystemExit(main())
