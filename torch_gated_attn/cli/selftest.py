# SPDX-License-Identifier: BSD-3-Clause
"""`python -m torch_gated_attn selftest`: whether this build computes the right thing on this machine.

Every instruction set and device computes a few calls, forward and backward, in every dtype. They are compared with
`torch_gated_attn.reference` in float64 and judged by what the reference itself gives in the same dtype.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _C, functional, reference

VARIABLE = "TORCH_GATED_ATTN_CPU_CAPABILITY"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value", "gate", "bias")
# A result passes if its largest error is within FACTOR of plain PyTorch's, or within SLACK units in the last place of
# the largest number: a build that computes something else is wrong by far more.
FACTOR, SLACK = 4, 16
# Each of the kernels' paths: a shared bias, grouped heads, few queries, odd sizes, nothing optional.
CASES: tuple[dict[str, object], ...] = (
    {"batch": 3, "heads": 2, "kv_heads": 2, "q": 70, "k": 130, "d": 32, "dv": 32, "bias": (1, 2, 70, 130)},
    {"batch": 2, "heads": 4, "kv_heads": 2, "q": 33, "k": 64, "d": 16, "dv": 16, "mask": "query", "masked_rows": "mean"},
    {"batch": 5, "heads": 4, "kv_heads": 1, "q": 1, "k": 37, "d": 24, "dv": 24},
    {"batch": 2, "heads": 3, "kv_heads": 3, "q": 19, "k": 29, "d": 7, "dv": 13, "gate": "head", "bias": (3, 19, 29)},
    {"batch": 2, "heads": 2, "kv_heads": 2, "q": 40, "k": 17, "d": 8, "dv": 8, "gate": None, "mask": None},
)


@dataclasses.dataclass
class Row:
    device: str
    kernels: str  # the instruction set, or the name of the device
    dtype: str
    verdict: str
    error: float | None = None  # the largest, over plain PyTorch's

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.2f}"
        return f"{self.device:8}{self.kernels:28}{self.dtype:10}{error:>8}  {self.verdict}"


def draw(case: dict[str, object], seed: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """query, key, value, gate, bias and mask, and the incoming gradients of out and lse."""
    generator = torch.Generator().manual_seed(seed)
    b, h, kv, q, k, d, dv = (int(str(case[name])) for name in ("batch", "heads", "kv_heads", "q", "k", "d", "dv"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    gate = {"full": normal(b, h, q, dv), "head": normal(b, h, q, 1), None: None}[case.get("gate", "full")]  # type: ignore[index]
    bias_shape = case.get("bias")
    bias = normal(*bias_shape) if isinstance(bias_shape, tuple) else None
    kind = case.get("mask", "key")
    mask = torch.rand((b, h, q, k) if kind == "query" else (b, 1, 1, k), generator=generator) < 0.8
    mask[0, ..., -1, :] = kind != "query"  # one fully masked row, or none
    tensors = [normal(b, h, q, d), normal(b, kv, k, d), normal(b, kv, k, dv), gate, bias]
    return [*tensors, None if kind is None else mask.to(device)], normal(b, h, q, dv), normal(b, h, q)


def evaluate(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor | None], d_out: Tensor, d_lse: Tensor, policy: str
) -> list[Tensor]:
    """out, lse and every gradient."""
    leaves = [x.detach().requires_grad_() for x in tensors[:5] if x is not None]
    given = iter(leaves)
    arguments = [None if x is None else next(given) for x in tensors[:5]]
    out, lse = function(*arguments, tensors[5], masked_rows=policy)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [d_out, d_lse.to(lse.dtype)])]


def judge(dtype: torch.dtype, device: str) -> tuple[bool, float]:
    """Whether every case passes, and the largest error over plain PyTorch's."""
    good, worst = True, 0.0
    for seed, case in enumerate(CASES):
        tensors, d_out, d_lse = draw(case, seed, dtype, device)
        policy = str(case.get("masked_rows", "zero"))

        def results(function: Callable[..., tuple[Tensor, Tensor]], kind: torch.dtype) -> list[Tensor]:
            cast = [x.to(kind) if x is not None and x.is_floating_point() else x for x in tensors]  # noqa: B023
            return evaluate(function, cast, d_out.to(kind), d_lse.to(kind), policy)  # noqa: B023

        gold = results(reference.gated_attention_with_lse, torch.float64)
        plain = results(reference.gated_attention_with_lse, dtype)
        ours = results(functional.gated_attention_with_lse, dtype)
        for true, ref, out in zip(gold, plain, ours, strict=True):
            finite = true.isfinite()
            good &= bool(torch.equal(out.double()[~finite], true[~finite]))
            size = float(true[finite].abs().max())
            error, allowed = (float((x.double() - true)[finite].abs().max()) for x in (out, ref))
            unit = SLACK * torch.finfo(dtype).eps * max(1.0, size)
            good &= error <= FACTOR * allowed + unit  # false where the error is NaN
            worst = max(worst, error / max(allowed, unit / SLACK))
    return good, worst


def check_device(device: str) -> list[Row]:
    kernels = _C.cpu_capability() if device == "cpu" else torch.cuda.get_device_name(device)
    rows = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            good, worst = judge(dtype, device)
            rows.append(Row(device, kernels, name, "ok" if good else "WRONG", worst))
        except RuntimeError as error:
            rows.append(Row(device, kernels, name, f"FAILED: {str(error).splitlines()[0]}"))
    return rows


def start(device: str, capability: str | None) -> subprocess.Popen[str]:
    """A process of its own, because the instruction set is chosen once per process, and so that a crash is a row too."""
    environment = {**os.environ, **({VARIABLE: capability} if capability else {})}
    command = [sys.executable, "-m", __name__, device]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def collect(process: subprocess.Popen[str], device: str, kernels: str) -> list[Row]:
    output, errors = process.communicate()
    if process.returncode not in (0, 1) or not output.startswith("["):
        last = (errors.strip().splitlines() or [""])[-1]
        return [Row(device, kernels, "all", f"FAILED: exit code {process.returncode} {last}")]
    rows = [Row(**row) for row in json.loads(output)]
    if device == "cpu" and rows[0].kernels != kernels:
        return [Row(device, kernels, "all", "not on this machine")]
    return rows


def devices() -> list[str]:
    if _C.cuda_version is None or not torch.cuda.is_available():
        return []
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def run(device: str | None, as_json: bool) -> int:
    """Print the table and return the exit code: 1 if a row is wrong. `device` is looked at in this process; None is all."""
    if device is not None:
        rows = check_device(device)
        print(json.dumps([dataclasses.asdict(row) for row in rows]) if as_json else "\n".join(map(str, rows)))
    else:
        started = [("cpu", name, start("cpu", name)) for name in _C.cpu_capabilities]
        started += [(name, name, start(name, None)) for name in devices()]
        print(f"{'device':8}{'kernels':28}{'dtype':10}{'error':>8}  result")
        rows = []
        for where, kernels, process in started:
            rows += (found := collect(process, where, kernels))
            print("\n".join(map(str, found)), flush=True)
        print("error: the largest of forward and backward, over that of plain PyTorch in the same dtype")
    return 0 if all(row.verdict in ("ok", "not on this machine") for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1], as_json=True))
