# SPDX-License-Identifier: BSD-3-Clause
torch_version: str
cuda_version: str | None
compiler: str
cpu_capabilities: tuple[str, ...]

def cpu_capability() -> str: ...
