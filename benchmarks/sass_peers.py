# SPDX-License-Identifier: BSD-3-Clause
"""The kernels that others run for bfloat16 and head_dims up to 64, as machine code, without a GPU: those of PyTorch's
memory-efficient attention, cut out of the installed library, and trifast's, compiled with Triton where it is installed."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from sass import Kernel, disassemble

# Of the forward the one for head_dims up to 64; of the backward one for each head_dim, for lengths divisible by 64.
SDPA = r"fmha_cutlass(F_bf16_aligned_64x64_rf|B_bf16_aligned_64x64_k(32|64)_seqaligned)_sm80"
SDPA_ELEMENTS = 64 * 64 // 128  # its blocks have four warps
TRIFAST = ("_fwd", "_bwd_q", "_bwd_kv", "_bwd_b")


class Peer(NamedTuple):
    label: str
    kernel: Kernel
    elements: int  # score elements of a thread in one round of the main loop


def sdpa(arch: str, cuobjdump: str) -> Iterator[Peer]:
    torch = importlib.util.find_spec("torch")
    library = pathlib.Path(torch.origin).parent / "lib" / "libtorch_cuda.so" if torch and torch.origin else None
    if library is None or not library.exists():
        print("PyTorch's kernels: skipped, this torch has no CUDA")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [cuobjdump, "-xelf", f".{arch}.cubin", str(library)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        for cubin in sorted(pathlib.Path(folder).iterdir()):
            if re.search(SDPA.encode(), cubin.read_bytes()):
                for kernel in disassemble(cubin, cuobjdump, SDPA):
                    yield Peer(f"SDPA {re.search(SDPA, kernel.symbol)[0]}", kernel, SDPA_ELEMENTS)


def trifast(arch: str, cuobjdump: str, head_dims: list[int]) -> Iterator[Peer]:
    """Every configuration that it tries on its first call. Triton's blocks are powers of two, so head_dim is one."""
    if not importlib.util.find_spec("trifast"):
        print("trifast's kernels: skipped, it is not installed")
        return
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        kernels = load_trifast(folder)
        tuned = [(d, name, getattr(kernels, name)) for d in head_dims if d & (d - 1) == 0 for name in TRIFAST]
        for head_dim, name, tuner in tuned:
            for config in tuner.configs:
                signature, constants, attributes = describe(tuner.fn, {**config.kwargs, "DIM": head_dim, "CLOSEST_N": 512})
                source = ASTSource(tuner.fn, signature, constexprs=constants, attrs=attributes)
                options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                cubin = pathlib.Path(folder) / "kernel.cubin"
                cubin.write_bytes(triton.compile(source, target=target, options=options).asm["cubin"])
                (kernel,) = disassemble(cubin, cuobjdump)
                queries, keys = config.kwargs["BLOCK_J"], config.kwargs["BLOCK_K"]
                label = f"trifast {name} D={head_dim} {queries}x{keys}, {config.num_warps} warps"
                # Not the exponentials: in small blocks several warps compute the same scores.
                yield Peer(label, kernel, queries * keys // (32 * config.num_warps))


def load_trifast(folder: str) -> Any:
    """Its module asks on import which GPU there is, and makes a folder for what it will have tuned on it."""
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(0, 0)),
        mock.patch("torch.cuda.get_device_name", return_value="none"),
        mock.patch.dict(os.environ, XDG_CONFIG_HOME=folder),
    ):
        return importlib.import_module("trifast.triton")


def describe(kernel: Any, constants: dict[str, int]) -> tuple[dict[str, str], dict[tuple[int], int], dict[tuple[int], Any]]:
    """What Triton would make of contiguous bfloat16 tensors whose sizes 16 divides: types of the arguments, those that are
    constant, those that 16 divides."""
    types = {"lse_ptr": "*fp32", "l_ptr": "*fp32", "mask_ptr": "*i1", "m_ptr": "*i1", "sm_scale": "fp32", "neg_inf": "fp32"}
    last = re.compile(r"stride_(\w*d|bn|dbn|lsen|ln|maskn|mn|dn)")
    constants = {**constants, **{name: 1 for name in kernel.arg_names if last.fullmatch(name)}}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        signature[name] = "constexpr" if name in constants else types.get(name, "*bf16" if pointer else "i32")
        if pointer or name == "N" or (name.startswith("stride") and name not in constants):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes
