# SPDX-License-Identifier: BSD-3-Clause
"""The emulated CUDA kernels as the operator's CPU kernels, so that the tests of the operator run on them unchanged.

What csrc/cuda/launcher.cpp does with tensors is repeated here in Python: copies of what has no contiguous rows, empty
calls, and the sum over a broadcast gate.
"""

import contextlib

import torch

from . import harness


def contiguous_rows(tensor):
    if tensor is None or tensor.dim() == 0 or tensor.size(-1) <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def empty_like_meta(meta):
    """What the shape function says a result looks like, poisoned."""
    result = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
    return result.fill_(torch.nan)


def on_meta(*tensors):
    return [None if t is None else t.to("meta") for t in tensors]


def named(scale, masked_rows, is_causal=False, window=None, key_lengths=None):
    """The options of an op by their names; an op's schema leaves out the last ones that have their defaults."""
    options = {"scale": scale, "masked_rows": masked_rows, "is_causal": is_causal, "window": window}
    return {**options, "key_lengths": key_lengths}


def readable_bias(bias, query):
    return bias if bias is None or query.dtype != torch.float64 else bias.double()


class Operator:
    """The two functional ops over one emulator library."""

    def __init__(self, library, arch=90, seed=1, shared_bytes=0):
        self.library, self.arch, self.seed, self.shared_bytes = library, arch, seed, shared_bytes

    def forward(self, query, key, value, gate, bias, mask, *options):
        options = named(*options)
        shapes = torch.ops.torch_gated_attn._gated_attention_forward(
            *on_meta(query, key, value, gate, bias, mask), **{**options, "key_lengths": on_meta(options["key_lengths"])[0]}
        )
        out, lse, row_max, row_sum = (empty_like_meta(m) for m in shapes)
        if lse.numel() == 0:
            return out, lse, row_max, row_sum
        call = harness.Call(
            self.library,
            *map(contiguous_rows, (query, key, value, gate)),
            readable_bias(bias, query),
            mask,
            **options,
        )
        dense = contiguous_rows(out)
        call.problem.out = call.view(dense, "out", writable=True)
        for name, rows in (("lse", lse), ("row_max", row_max), ("row_sum", row_sum)):
            setattr(call.problem, name, call.view(rows, "rows", writable=True))
        call.run(self.library.emulator_forward, self.arch, self.seed)
        if dense is not out:
            out.copy_(dense)
        return out, lse, row_max, row_sum

    def backward(
        self,
        grad_out,
        grad_lse,
        query,
        key,
        value,
        gate,
        bias,
        mask,
        out,
        row_max,
        row_sum,
        scale,
        masked_rows,
        grad_mask,
        *positions,
    ):
        inputs = dict(zip(harness.NAMES, (query, key, value, gate, bias), strict=True))
        wanted = [n for n, w in zip(harness.NAMES, grad_mask, strict=True) if w and inputs[n] is not None]
        if row_sum.numel() == 0 or key.size(-2) == 0:
            gradients = {n: torch.zeros_like(inputs[n]) for n in wanted}
            if "gate" in wanted and grad_out is not None:  # `out` may be of keys that are not at hand
                d_gate = grad_out.to(row_sum.dtype) * out * torch.sigmoid(-gate.to(row_sum.dtype))
                gradients["gate"] = d_gate.sum_to_size(gate.shape).to(gate.dtype)
        else:
            gradients = harness.backward(
                self.library,
                (contiguous_rows(out), None, row_max, row_sum),
                grad_out,
                grad_lse,
                *map(contiguous_rows, (query, key, value, gate)),
                readable_bias(bias, query),
                mask,
                wanted,
                self.arch,
                self.seed,
                **named(scale, masked_rows, *positions),
            )
            if "bias" in gradients:
                gradients["bias"] = gradients["bias"].to(bias.dtype)
        return tuple(gradients.get(n) for n in harness.NAMES)


@contextlib.contextmanager
def as_cpu_kernels(operator):
    """Within, torch_gated_attn on CPU tensors runs the emulated CUDA kernels."""
    overrides = torch.library.Library("torch_gated_attn", "IMPL")
    try:
        operator.library.emulator_limit_shared_bytes(operator.shared_bytes)
        overrides.impl("_gated_attention_forward", operator.forward, "CPU", allow_override=True)
        overrides.impl("_gated_attention_backward", operator.backward, "CPU", allow_override=True)
        yield
    finally:
        operator.library.emulator_limit_shared_bytes(0)
        overrides._destroy()
