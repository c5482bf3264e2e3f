# SPDX-License-Identifier: BSD-3-Clause
"""Which implementation computes the core of a call of `gated_attention`: the fused operator, or PyTorch's own attention
followed by one gating pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._structure import both, check_structure, structure_mask

__all__ = ["WIDEST_FUSED", "Plan", "choose", "plan", "sdpa"]

# head_dims above this have no tensor-core kernel of ours (csrc/cuda/select.cpp); the general one is far from the peak.
WIDEST_FUSED = 128


def choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    masked_rows: str = "zero",
    causal_only: bool = False,
    device_type: str | None = None,
) -> tuple[str, str]:
    """The core of a call, "fused" or "sdpa", and the reason.

    Args:
        causal_only: the call is causal with as many queries as keys and has no mask besides, a flag of PyTorch's kernels.
        device_type: "cpu" or "cuda", as if the tensors were there.
    """
    device_type = device_type or query.device.type
    causal_cpu = causal_only and device_type == "cpu" and query.dtype == torch.float32
    wide_cuda = device_type == "cuda" and query.size(-1) > WIDEST_FUSED
    if not (causal_cpu or wide_cuda):
        return "fused", "the operator has a kernel for it"
    # What PyTorch's attention does not do, or not in its fast kernels.
    if masked_rows != "zero":
        return "fused", 'masked_rows is not "zero"'
    if value.size(-1) != query.size(-1):
        return "fused", "value's head_dim is not query's"
    if bias is not None and (mask is not None or bias.requires_grad or bias.dtype != query.dtype):
        return "fused", "the bias needs a gradient, has another dtype, or comes with a mask"
    if torch.are_deterministic_algorithms_enabled():
        return "fused", "deterministic algorithms are asked for"
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "fused", "inside a torch.func transform"
    if causal_cpu:
        # Intel core with AVX-512, 4 heads, L = 1024, D = 256, forward and backward: 364 against 493 ms; equal in bfloat16.
        return "sdpa", "PyTorch's kernel skips the half of the keys that a causal float32 call on a CPU hides"
    return "sdpa", f"head_dim {query.size(-1)} is above {WIDEST_FUSED}, the widest fused CUDA kernel"


class Plan(NamedTuple):
    """How a call is computed: its core and the reason, whether "causal" stays a flag, and the mask that is left."""

    core: str
    reason: str
    causal_only: bool
    mask: Tensor | None


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    masked_rows: str,
    is_causal: bool,
    window: int | None,
    key_lengths: Tensor | None,
    device_type: str | None = None,
) -> Plan:
    """Arguments as of `gated_attention` and `choose`. Positions become a mask, where no kernel takes them as a flag."""
    structured = is_causal or window is not None or key_lengths is not None
    if not structured and query.size(-1) <= WIDEST_FUSED:
        return Plan("fused", "the operator has a kernel for it", False, mask)
    check_structure(query, is_causal, window, key_lengths)
    queries, keys = query.size(-2), key.size(-2)
    alone = mask is None and bias is None and key_lengths is None and (window is None or window >= keys)
    causal_only = is_causal and alone and queries == keys

    def with_structure() -> Tensor | None:
        shown = structure_mask(
            queries, keys, is_causal=is_causal, window=window, key_lengths=key_lengths, device=query.device
        )
        return both(mask, shown)

    if structured and not causal_only:
        mask = with_structure()
    core, reason = choose(
        query, key, value, bias, mask, masked_rows=masked_rows, causal_only=causal_only, device_type=device_type
    )
    if causal_only and core == "fused":
        mask = with_structure()
    return Plan(core, reason, causal_only, mask)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    causal_only: bool,
) -> Tensor:
    r"""The call by PyTorch's attention and `gate_output`; arguments as `choose` has let pass, [\*, H, L, D]."""
    batch, heads, kv_heads = query.shape[:-3], query.size(-3), key.size(-3)
    terms = mask if mask is not None else bias
    if terms is not None:
        # With grouped heads a mask would send PyTorch to its slow path, so the heads are repeated.
        key, value = (x.repeat_interleave(heads // kv_heads, -3) if kv_heads != heads else x for x in (key, value))
        terms = terms.expand(*batch, *terms.shape[-3:]) if terms.dim() > 3 else terms
    if len(batch) != 1:  # the fast kernels take four dimensions
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        if terms is not None and terms.dim() > 3:
            terms = terms.reshape(-1, *terms.shape[-3:])
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=terms,
        is_causal=causal_only,
        scale=scale,
        enable_gqa=key.size(-3) != heads,
    )
    out = out.reshape(*batch, *out.shape[-3:]) if len(batch) != 1 else out
    if gate is None:
        return out
    gated: Tensor = torch.ops.torch_gated_attn.gate_output(out, gate)
    return gated
