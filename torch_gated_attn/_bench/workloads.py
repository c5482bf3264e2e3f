# SPDX-License-Identifier: BSD-3-Clause
"""The shapes of workloads.json, or others, as tensors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORKLOADS = Path(__file__).with_name("workloads.json")
MASKED_SHARE = 0.1  # of the keys of every row, at random, as padding and unresolved residues do
FULLY_MASKED = 3  # batch rows without any key, in the workloads that have such rows

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass
class Workload:
    name: str
    title: str
    batch: list[int]
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    bias_shape: list[int] | None
    mask_shape: list[int]
    gated: bool
    fully_masked: bool
    dtypes: list[str]

    def attended_pairs(self, mask: Tensor) -> int:
        """Query-key pairs that take part, over all batch entries and heads."""
        pairs = mask.expand(*self.batch, self.heads, self.q_len, self.k_len).sum(dtype=torch.int64)
        return int(pairs)

    def cut(self, limit: int) -> Workload:
        """The same with at most `limit` entries in every batch dimension."""

        def cut_batch(shape: list[int]) -> list[int]:
            return [min(size, limit) for size in shape[:-3]] + shape[-3:]

        return dataclasses.replace(
            self,
            batch=[min(size, limit) for size in self.batch],
            bias_shape=cut_batch(self.bias_shape) if self.bias_shape else None,
            mask_shape=cut_batch(self.mask_shape),
            fully_masked=self.fully_masked and limit > 1,  # a lone row should attend to something
        )

    def describe(self) -> str:
        kv = f" (kv {self.kv_heads})" if self.kv_heads != self.heads else ""
        batch = "x".join(str(n) for n in self.batch)
        return f"batch {batch}, heads {self.heads}{kv}, Q {self.q_len}, K {self.k_len}, head_dim {self.head_dim}"


@dataclass
class Inputs:
    query: Tensor  # [*, H, Q, D]
    key: Tensor  # [*, Hkv, K, D]
    value: Tensor  # [*, Hkv, K, D]
    gate: Tensor | None  # [*, H, Q, D]
    bias: Tensor | None
    mask: Tensor
    grad_out: Tensor  # [*, H, Q, D], zero in rows that attend to nothing, where the paths differ by convention

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        return self.query, self.key, self.value, self.gate, self.bias, self.mask

    @property
    def differentiable(self) -> dict[str, Tensor]:
        named = {"query": self.query, "key": self.key, "value": self.value, "gate": self.gate, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def load(path: Path = WORKLOADS, batch_key: str = "cpu_batch") -> list[Workload]:
    return [_parse(entry, batch_key) for entry in json.loads(path.read_text())["workloads"]]


def _parse(entry: dict[str, Any], batch_key: str) -> Workload:
    batch = entry[batch_key] if isinstance(entry[batch_key], list) else [entry[batch_key]]
    sizes = {"H": entry["heads"], "Q": entry["q"], "K": entry["k"], "B": batch[-1]}

    def shape(text: str) -> list[int]:  # "[1,H,Q,K] grad" -> sizes; any other text is a key mask per batch row
        listed = re.search(r"\[(.*)\]", text)
        names = listed.group(1).split(",") if listed else ["B", "1", "1", "K"]
        return [sizes[name] if name in sizes else int(name) for name in names]

    return Workload(
        name=entry["id"],
        title=entry["name"],
        batch=batch,
        heads=entry["heads"],
        kv_heads=entry.get("kv_heads", entry["heads"]),
        q_len=entry["q"],
        k_len=entry["k"],
        head_dim=entry["head_dim"],
        bias_shape=shape(entry["bias"]) if entry["bias"] else None,
        mask_shape=shape(entry["mask"]),
        gated="gate" not in entry,
        fully_masked="all False" in entry["mask"],
        dtypes=entry["dtypes"],
    )


def make_inputs(workload: Workload, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    w = workload
    query = normal(*w.batch, w.heads, w.q_len, w.head_dim)
    key, value = (normal(*w.batch, w.kv_heads, w.k_len, w.head_dim) for _ in range(2))
    gate = normal(*query.shape) if w.gated else None
    bias = normal(*w.bias_shape) if w.bias_shape else None

    masked = max(1, round(w.k_len * MASKED_SHARE))
    order = torch.rand(w.mask_shape, generator=generator, device=device).argsort(-1)
    mask = order >= masked  # a permutation, so every row masks the same number of keys
    if w.fully_masked:
        mask.view(-1, w.k_len)[:: math.ceil(mask.numel() / w.k_len / FULLY_MASKED)] = False
    grad_out = normal(*query.shape) * mask.any(-1, keepdim=True)
    inputs = Inputs(query, key, value, gate, bias, mask, grad_out)
    for tensor in inputs.differentiable.values():
        tensor.requires_grad_()
    return inputs
