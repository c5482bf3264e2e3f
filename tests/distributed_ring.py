# SPDX-License-Identifier: BSD-3-Clause
"""The cases of test_distributed_ring.py: keys spread over processes beside the formula in one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from inputs import DIFFERENTIABLE, Inputs, draw, evaluate
from oracle import gold
from processes import gap
from tolerance import Judge
from torch import Tensor

from torch_gated_attn.distributed import ring_gated_attention, split_key_attention

Sizes = Sequence[int] | None


@dataclasses.dataclass
class Case:
    """q, k: positions in all; *_sizes: of every process, None as torch.tensor_split has it."""

    batch: tuple[int, ...] = (3,)
    heads: int = 4
    kv_heads: int | None = None
    q: int = 7
    k: int = 13
    gate: Any = "full"
    bias: Any = (4, 7, 13)
    mask: Any = (3, 1, 7, 13)
    q_sizes: Sizes = None
    k_sizes: Sizes = None
    louder: float = 0  # the first keys' bias, beyond what an exponential can hold
    louder_keys: int | None = None
    heads_inside: bool = False
    lengths: bool = False
    named_sizes: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def draw(self) -> Inputs:
        inputs = draw(
            seed=5, dtype=self.dtype, batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, q=self.q, k=self.k,
            gate=self.gate, bias=self.bias, mask=self.mask, masked_rows=self.options.get("masked_rows", "zero"),
            scale=self.options.get("scale"),
        )  # fmt: skip
        if inputs.mask is not None and inputs.mask.dim() == 4 and inputs.mask.shape[-2] > 1:
            inputs.mask[0, ..., 0, :] = False  # attends to nothing
            inputs.mask[-1, ..., -1, : self.k // 2] = False  # to nothing of the first processes
        if self.louder:
            inputs.bias[..., : self.k // 4 if self.louder_keys is None else self.louder_keys] += self.louder
        return inputs

    def key_lengths(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.k + 1, self.batch, generator=generator) if self.lengths else None

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """The mask with what is_causal, window and key_lengths hide, by positions among all."""
        if not self.options.get("is_causal") and not self.lengths:
            return mask
        query, key = torch.arange(self.q).unsqueeze(-1) + self.k - self.q, torch.arange(self.k)
        seen = torch.ones(self.q, self.k, dtype=torch.bool)
        if self.options.get("is_causal"):
            seen = key <= query
            if (window := self.options.get("window")) is not None:
                seen = seen & (key > query - window)
        if (lengths := self.key_lengths()) is not None:
            seen = seen & (key < lengths[..., None, None, None])
        return seen if mask is None else mask & seen


CAUSAL = {"is_causal": True}
NO_MASK: dict[str, Any] = {"mask": None}
# More batch dimensions than the kernels take: bias and mask alternate between having and not having one.
FORMULA: dict[str, Any] = {
    "batch": (2, 2, 2, 2, 2), "heads": 1, "q": 4, "k": 5, "gate": (2, 1, 2, 1, 2, 1, 4, 8),
    "bias": (2, 1, 2, 1, 2, 1, 4, 5), "mask": (2, 1, 2, 1, 2, 1, 1, 5),
}  # fmt: skip
CASES: dict[str, Case] = {
    "bias of heads, dead rows": Case(),
    "masked_rows mean": Case(options={"masked_rows": "mean"}),
    "key mask, one bias": Case(mask=(3, 1, 1, 13), bias=(1, 7, 13)),
    "bias the same for all queries": Case(bias=(4, 1, 13)),
    "bias the same for all keys": Case(bias=(4, 7, 1)),
    "bias of rank 1": Case(bias=(13,)),
    "grouped heads, headwise gate, scale, mean": Case(
        kv_heads=2, gate="head", options={"scale": 0.2, "masked_rows": "mean"}
    ),
    "multi-query, gate the same for all queries": Case(kv_heads=1, gate=(4, 1, 8)),
    "no gate, no bias, no mask": Case(gate=None, bias=None, mask=None),
    "first logits far above": Case(louder=300.0, **NO_MASK),
    "first logits far below": Case(louder=-300.0),
    "all logits far below, dead rows": Case(louder=-1000.0, louder_keys=13),
    "heads inside, two batch dimensions": Case(batch=(2, 3), mask=(2, 3, 1, 1, 13), heads_inside=True),
    "no batch dimension": Case(batch=(), mask=None),
    "fewer keys than processes": Case(k=2, bias=(4, 7, 2), mask=(3, 1, 7, 2)),
    "fewer queries than processes": Case(q=2, bias=(4, 2, 13), mask=(3, 1, 2, 13)),
    "one key": Case(k=1, bias=(4, 7, 1), mask=(3, 1, 7, 1), options={"masked_rows": "mean"}),
    "no key": Case(k=0, bias=(4, 7, 1), mask=None, options={"masked_rows": "mean"}),
    "no key here and there": Case(k_sizes=(0, 9, 0, 4), q_sizes=(3, 0, 4, 0)),
    "sizes named": Case(k_sizes=(1, 7, 3, 2), q_sizes=(4, 1, 2, 0), named_sizes=True, options=CAUSAL),
    "causal": Case(q=12, k=12, bias=(4, 12, 12), mask=None, options=CAUSAL),
    "causal, more keys, dead rows, mean": Case(options={**CAUSAL, "masked_rows": "mean"}),
    "causal, more queries than keys": Case(q=13, k=5, bias=(4, 13, 5), mask=None, options=CAUSAL),
    "causal, window": Case(q=12, k=12, bias=(4, 12, 12), mask=None, options={**CAUSAL, "window": 4}),
    "causal, window of one, key mask": Case(mask=(3, 1, 1, 13), options={**CAUSAL, "window": 1}),
    "causal, window, key_lengths, uneven": Case(
        lengths=True, k_sizes=(5, 1, 0, 7), q_sizes=(2, 3, 1, 1), options={**CAUSAL, "window": 6}
    ),
    "key_lengths": Case(lengths=True, mask=None),
    "key_lengths, mean": Case(lengths=True, options={"masked_rows": "mean"}),
    "by the formula": Case(**FORMULA),
    "by the formula, all logits far below": Case(**FORMULA, louder=-1000.0, louder_keys=5),
    "float32": Case(q=40, k=52, bias=(4, 40, 52), mask=(3, 1, 40, 52), dtype=torch.float32),
    "bfloat16": Case(q=40, k=52, bias=(4, 40, 52), mask=(3, 1, 40, 52), dtype=torch.bfloat16),
    "float16, mean": Case(
        q=40, k=52, bias=(4, 40, 52), mask=(3, 1, 40, 52), dtype=torch.float16, options={"masked_rows": "mean"}
    ),
    "bfloat16, causal": Case(q=40, k=52, bias=(4, 40, 52), mask=None, dtype=torch.bfloat16, options=CAUSAL),
}  # fmt: skip
ON_FEWER = (
    "bias of heads, dead rows", "grouped heads, headwise gate, scale, mean", "fewer keys than processes", "one key",
    "causal, more keys, dead rows, mean", "causal, window", "key_lengths, mean", "bfloat16",
)  # fmt: skip


class Summed(torch.autograd.Function):
    """The argument of every process; its gradient is the sum over the processes of a group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def parts(size: int, count: int, sizes: Sizes) -> list[int]:
    return [len(p) for p in torch.arange(size).tensor_split(count)] if sizes is None else list(sizes)


def whole_operator(
    case: Case, function: Callable[..., Any], group: dist.ProcessGroup
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`function` on this process's part of whole arguments; the whole result, whose gradients are summed over the group."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    ring = function is ring_gated_attention
    queries, keys = parts(case.q, count, case.q_sizes), parts(case.k, count, case.k_sizes)

    def own(tensor: Tensor | None, dim: int, sizes: list[int], broadcasts: bool) -> Tensor | None:
        if tensor is None or tensor.dim() < -dim or (broadcasts and tensor.shape[dim] == 1):
            return tensor
        return tensor.narrow(dim, sum(sizes[:rank]), sizes[rank])

    def call(
        query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, bias: Tensor | None, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        summed = [None if t is None else Summed.apply(t, group) for t in (query, key, value, gate, bias)]
        query_, key_, value_, gate_, bias_ = summed
        if case.heads_inside:
            query_ = query_.transpose(-2, -3).contiguous().transpose(-2, -3)
        mask = case.draw().mask
        key_, value_ = (own(t, -2, keys, False) for t in (key_, value_))
        if ring:
            query_, gate_, bias_, mask = (own(t, -2, queries, t is not query_) for t in (query_, gate_, bias_, mask))
        else:
            bias_, mask = (own(t, -1, keys, True) for t in (bias_, mask))
        sizes = {"key_sizes": keys, **({"query_sizes": queries} if ring else {})} if case.named_sizes else {}
        options = {**case.options, "key_lengths": case.key_lengths(), **sizes}
        out, lse = function(query_, key_, value_, gate_, bias_, mask, group=group, return_lse=True, **options)
        assert not case.heads_inside or out.transpose(-2, -3).is_contiguous()
        if not ring:
            if rank > 0:  # every process has the whole: Summed shall add those gradients once
                for t in (query_, gate_):
                    if t is not None:
                        t.register_hook(torch.zeros_like)
            return out, lse
        gathered: list[Any] = [None] * count
        dist.all_gather_object(gathered, (out.detach(), lse.detach()), group)
        gathered[rank] = out, lse
        outs, lses = zip(*gathered, strict=True)
        return torch.cat(outs, -2), torch.cat(lses, -1)

    return call


def compare(case: Case, function: Callable[..., Any], group: dist.ProcessGroup) -> str:
    inputs = case.draw()
    seen = inputs.replace(mask=case.visible(inputs.mask))
    operator = whole_operator(case, function, group)
    if case.dtype in (torch.bfloat16, torch.float16):
        judge = Judge(operator)
        judge.compare("", seen)
        return "; ".join(judge.failures)
    allowed = 1e-12 if case.dtype == torch.float64 else 1e-5
    true = gold(seen)
    results = evaluate(operator, seen)
    wrong = []
    for name, got in results.items():
        if not torch.equal(got == -torch.inf, true[name] == -torch.inf):
            wrong.append(f"{name}: infinities differ")
        error = gap(got.nan_to_num(neginf=0), true[name].nan_to_num(neginf=0))
        if not error < allowed:
            wrong.append(f"{name} differs by {error:.1e}")
    if not {f"d_{n}" for n in DIFFERENTIABLE if getattr(inputs, n) is not None} <= results.keys():
        wrong.append("a gradient is missing")
    return "; ".join(wrong)


def ring_cases(groups: dict[str, dist.ProcessGroup]) -> dict[str, Callable[[], str]]:
    """By group and function; only the groups that this process is in."""
    cases = {}
    for label, group in groups.items():
        for name, case in CASES.items():
            if dist.get_world_size(group) < 4 and name not in ON_FEWER:
                continue
            for function in (ring_gated_attention, split_key_attention):
                cases[f"{function.__name__}, {label}: {name}"] = lambda c=case, f=function, g=group: compare(c, f, g)
    return cases


#: Of these the shards are computed by the emulated CUDA kernels, tensor-core and plain.
EMULATED = ("bfloat16", "float16, mean", "bfloat16, causal", "causal, window", "key_lengths, mean", "no key here and there")


def emulated_cases(group: dist.ProcessGroup, library: Path) -> dict[str, Callable[[], str]]:
    from cuda_emulator import harness
    from cuda_emulator.as_cpu import Operator, as_cpu_kernels

    operator = Operator(harness.load(library))

    def run(case: Case, function: Callable[..., Any]) -> str:
        harness.LAUNCHED.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about what is done here on purpose: kernels are replaced
            with as_cpu_kernels(operator):
                found = compare(case, function, group)
        idle = case.k_sizes is not None  # some process has no key, and then nothing to launch
        return found or ("" if harness.LAUNCHED or idle else "no emulated kernel ran")

    functions = ring_gated_attention, split_key_attention
    return {f"{f.__name__}: {n}": lambda c=CASES[n], f=f: run(c, f) for n in EMULATED for f in functions}
