# SPDX-License-Identifier: BSD-3-Clause
"""A call of every kind of kernel, forward and backward, small enough for compute-sanitizer; run as a program."""

from __future__ import annotations

import sys

import torch

import torch_gated_attn


def main(device: str = "cuda") -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for d in (8, 12, 32):

            def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

            mask = torch.rand(5, 1, 1, 70, device=device) < 0.8
            tensors = draw(5, 2, 40, d), draw(5, 2, 70, d), draw(5, 2, 70, d), draw(5, 2, 40, d), draw(1, 2, 40, 70)
            out = torch_gated_attn.gated_attention(*tensors, mask)
            out.backward(torch.ones_like(out))
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
