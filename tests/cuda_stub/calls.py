# SPDX-License-Identifier: BSD-3-Clause
"""Run with the stub of the runtime preloaded: calls on every pair of device and stream, and where their launches went.

`calls.py RUNTIME [LAUNCHER]` prints one line for each set of calls, which ends in a list of what was wrong.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterator

import torch

import torch_gated_attn  # noqa: F401  # registers the operators

RUNTIME = ctypes.CDLL(sys.argv[1])
RUNTIME.stream_of_launch.restype = ctypes.c_void_p
OPS = torch.ops.torch_gated_attn
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEAD_DIMS = (8, 32)  # what no fused kernel takes would need a cuBLAS that runs


def launches() -> Iterator[tuple[int, int, int]]:
    """Current device, device of the stream (-1: the default one) and stream of every launch."""
    for i in range(RUNTIME.count_launches()):
        yield RUNTIME.device_of_launch(i), RUNTIME.stream_device_of_launch(i), RUNTIME.stream_of_launch(i) or 0


def tensors(device: str, dtype: torch.dtype, dim: int) -> list[torch.Tensor]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)

    mask = torch.ones(5, 1, 1, 70, dtype=torch.bool, device=device)
    return [empty(5, 2, 40, dim), empty(5, 2, 70, dim), empty(5, 2, 70, dim), empty(5, 2, 40, dim), empty(2, 40, 70), mask]


def through_autograd(arguments: list[torch.Tensor]) -> None:
    out = OPS.gated_attention(*arguments)
    out.backward(torch.zeros_like(out))


def directly(arguments: list[torch.Tensor]) -> None:
    """Autograd's threads make a device current by themselves; nobody does that for these."""
    plain = [t.detach() for t in arguments]
    out, lse, row_max, row_sum = OPS._gated_attention_forward(*plain, None, "zero")
    OPS._gated_attention_backward(out, lse, *plain, out, row_max, row_sum, None, "zero", [True] * 5)


def check(device: int, own_stream: bool) -> None:
    stream = torch.cuda.Stream(device) if own_stream else torch.cuda.default_stream(device)
    torch.cuda.set_stream(stream)
    torch.cuda.set_device(0)
    expected = (device, device if own_stream else -1, stream.cuda_stream)
    wrong = []
    for call, dtype, dim in itertools.product((through_autograd, directly), DTYPES, HEAD_DIMS):
        arguments = tensors(f"cuda:{device}", dtype, dim)
        RUNTIME.forget_launches()
        call(arguments)
        happened = list(launches())
        if len(happened) < 2 or any(launch != expected for launch in happened):
            wrong.append((call.__name__, str(dtype), dim, happened))
        if torch.cuda.current_device() != 0:
            wrong.append((call.__name__, "left another device current"))
    print(f"device {device}, {'a stream of its own' if own_stream else 'the default stream'}: {wrong}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        torch.ops.load_library(sys.argv[2])
    for device, own_stream in itertools.product((0, 1), (False, True)):
        check(device, own_stream)
