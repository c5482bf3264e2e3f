# SPDX-License-Identifier: BSD-3-Clause
torch_version: str
cuda_version: str | None
compiler: str
cpu_capabilities: tuple[str, ...]

Layout = tuple[str, tuple[int, ...], tuple[int, ...], int]

def cpu_capability() -> str: ...
def explain(
    tensors: list[Layout | None],
    scale: float | None,
    masked_rows: str,
    is_causal: bool,
    window: int | None,
    bias_requires_grad: bool,
    grad_mask: list[bool],
    arch: int | None,
) -> tuple[str, str, dict[str, str]]: ...
