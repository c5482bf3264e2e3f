# SPDX-License-Identifier: BSD-3-Clause
"""Every registered operator called directly with arguments that make no sense: an exception or the right result, no signal.

Each attempt changes one to three arguments of a valid call. It runs in a process of its own, which prints the seed of
every call before it makes it. TORCH_GATED_ATTN_HOSTILE_CALLS=N makes N calls, TORCH_GATED_ATTN_FUZZ_SEED is the first seed;
`python tests/test_hostile.py SEED 1` repeats one.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import DTYPES, HALF, draw
from torch import Tensor

CALLS = int(os.environ.get("TORCH_GATED_ATTN_HOSTILE_CALLS", "1500"))
SEED = int(os.environ.get("TORCH_GATED_ATTN_FUZZ_SEED", "1"))
ADDRESS_SPACE = 16 << 30
OPERATORS = ("gated_attention", "gated_attention_with_lse", "_gated_attention_forward", "_gated_attention_backward")
# What a refusal may be: ours (ValueError, TypeError, RuntimeError) and PyTorch's own.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, OverflowError, MemoryError)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x, x]) if x.dim() > 0 else x


def resized(x: Tensor, rng: random.Random) -> Tensor:
    """One dimension larger, smaller, or empty."""
    shape = list(x.shape)
    if shape:
        d = rng.randrange(len(shape))
        shape[d] = rng.choice([0, 1, shape[d] + 1, max(0, shape[d] - 1), 3 * shape[d]])
    return torch.zeros(shape, dtype=x.dtype)


def huge(x: Tensor, rng: random.Random) -> Tensor:
    """One dimension of up to 2^40 elements, expanded from one."""
    if not x.dim() or 0 in x.shape:
        return x
    d = rng.randrange(x.dim())
    shape = list(x.shape)
    shape[d] = rng.choice([2**31 - 1, 2**31, 2**32 + 1, 2**40])
    return x.narrow(d, 0, 1).expand(shape)


def overlapping(x: Tensor, rng: random.Random) -> Tensor:
    """Rows that share memory: strides of 1 or 0."""
    buffer = torch.randn(sum(x.shape) + 1).to(x.dtype)
    return buffer.as_strided(x.shape, [rng.choice([0, 1]) for _ in x.shape])


TENSOR_ATTACKS: list[Callable[[Tensor, random.Random], object]] = [
    lambda x, rng: None,
    lambda x, rng: rng.choice([3, "query", 1.5, [1, 2], True]),
    lambda x, rng: x.unsqueeze(0),
    lambda x, rng: x[0] if x.dim() and len(x) else x,
    lambda x, rng: x.reshape(-1),
    lambda x, rng: x.sum(),
    lambda x, rng: torch.empty(0),
    lambda x, rng: x.transpose(rng.randrange(x.dim()), rng.randrange(x.dim())) if x.dim() else x,
    lambda x, rng: x.to(rng.choice([*DTYPES, torch.complex64, torch.int64, torch.uint8, torch.bool, torch.complex128])),
    lambda x, rng: x.to("meta"),
    lambda x, rng: x.to_sparse() if x.dim() else x,
    lambda x, rng: x.to_mkldnn() if x.dtype == torch.float32 else x,
    lambda x, rng: nested(x),
    lambda x, rng: torch.full_like(x, rng.choice([0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e30])),
    lambda x, rng: x.detach().requires_grad_() if x.is_floating_point() else x,
    lambda x, rng: x.conj() if x.is_complex() else torch._neg_view(x) if x.is_floating_point() else x,
    lambda x, rng: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8) if x.dtype == torch.float32 else x,
    resized,
    huge,
    overlapping,
]


def valid_call(rng: random.Random, seed: int) -> tuple[str, list[object]]:
    inputs = draw(
        seed=seed,
        dtype=rng.choice(DTYPES),
        batch=rng.choice([(), (2,), (2, 3)]),
        heads=4,
        kv_heads=rng.choice([1, 2, 4]),
        q=rng.choice([1, 2, 5, 40]),
        k=rng.choice([1, 3, 33]),
        d=rng.choice([1, 4, 17]),
        dv=rng.choice([1, 4, 9]),
        gate=rng.choice([None, "full", "head"]),
        bias=rng.choice([None, "full"]),
        mask=rng.choice([None, "key", "full"]),
        masked_rows=rng.choice(["zero", "mean"]),
    )
    inputs = inputs.replace(is_causal=rng.random() < 0.5)
    if inputs.is_causal:
        inputs = inputs.replace(window=rng.choice([None, 1, 2, 33, 2**31, 2**62, 2**63 - 1]))
    if rng.random() < 0.5:
        lengths = torch.randint(-2, 40, inputs.query.shape[:-3], dtype=rng.choice([torch.int32, torch.int64]))
        inputs = inputs.replace(key_lengths=lengths)
    name = rng.choice(OPERATORS)
    tail: list[object] = [inputs.scale, inputs.masked_rows]
    if name != "_gated_attention_backward":
        return name, [*inputs.tensors, *tail, *inputs.visibility]
    results = torch.ops.torch_gated_attn._gated_attention_forward(*inputs.tensors, *tail, *inputs.visibility)
    saved = [results[0], results[2], results[3]]
    wanted = [rng.random() < 0.8 for _ in range(5)]
    return name, [inputs.grad_out, inputs.grad_lse, *inputs.tensors, *saved, *tail, wanted, *inputs.visibility]


def attacked(name: str, arguments: list[object], rng: random.Random) -> list[object]:
    arguments = list(arguments)
    for _ in range(rng.choice([1, 1, 2, 3])):
        i = rng.randrange(len(arguments))
        value = arguments[i]
        if isinstance(value, Tensor):
            plain = value.layout == torch.strided and not value.is_nested and not value.is_quantized
            if not plain or value.numel() > 10**6:
                continue  # one attack was enough; a second would only work PyTorch hard
            arguments[i] = rng.choice(TENSOR_ATTACKS)(value, rng)
        elif value is None or isinstance(value, float):
            shape = [rng.randint(0, 5) for _ in range(rng.randint(0, 5))]
            arguments[i] = rng.choice([0.0, -1e300, float("nan"), float("inf"), torch.zeros(shape), "x", None])
        elif isinstance(value, str):
            arguments[i] = rng.choice(["", "nan", "zero", "mean", "ZERO", "x" * 1000, None, 3])
        elif isinstance(value, bool):
            arguments[i] = rng.choice([True, False, None, 2, "x"])
        elif isinstance(value, int):
            arguments[i] = rng.choice([0, -1, -(2**63), 2**63 - 1, 2**64, 1.5, None, True])
        elif isinstance(value, list):
            arguments[i] = rng.choice([[], [True], [True] * 6, [False] * 5, None, [None] * 5])
    return arguments


def call(name: str, arguments: list[object]) -> list[Tensor | None]:
    op = getattr(torch.ops.torch_gated_attn, name)
    positional = len(arguments) if name.startswith("_") else 6
    names = ("scale", "masked_rows", "is_causal", "window", "key_lengths")
    options = dict(zip(names, arguments[positional:], strict=False))
    result = op(*arguments[:positional], **options)
    return list(result) if isinstance(result, tuple) else [result]


def dense(x: object) -> object:
    """The same argument in plain memory of its own; float64, in which the expected result is computed."""
    if not isinstance(x, Tensor):
        return x
    plain = x.detach().resolve_conj().resolve_neg().contiguous()
    return plain.double() if plain.is_floating_point() else plain


def check_forward(name: str, arguments: list[object], results: list[Tensor | None]) -> None:
    """A call that was not refused gives what the reference gives."""
    from torch_gated_attn import reference

    tensors = [dense(x) for x in arguments[:6]]
    out = results[0]
    if out is None or out.is_meta or any(isinstance(x, Tensor) and x.numel() > 10**6 for x in (out, *tensors)):
        return
    for x in arguments[:6]:
        if isinstance(x, Tensor) and x.is_floating_point() and not bool((x.abs() < 1e3).all()):
            return  # where a NaN or an overflow spreads is promised per row, and tested elsewhere
    scale = arguments[6]
    if scale is not None and not abs(float(scale)) < 100:  # type: ignore[arg-type]
        return
    window = None if arguments[9] is None else int(arguments[9])  # type: ignore[call-overload]  # True is 1
    seen = {"is_causal": bool(arguments[8]), "window": window, "key_lengths": dense(arguments[10])}
    expected = reference.gated_attention(*tensors, scale=scale, masked_rows=arguments[7], **seen)  # type: ignore[arg-type]
    bound = 0.05 if out.dtype in HALF else 1e-3
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound, msg=f"{name} is wrong")


def attempt(seed: int) -> bool:
    """Whether the call was refused."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, arguments = valid_call(rng, seed)
    try:
        arguments = attacked(name, arguments, rng)
    except REFUSALS:
        return True  # PyTorch would not even make the argument
    try:
        results = call(name, arguments)
    except REFUSALS as error:
        if not str(error).strip():
            raise AssertionError("an error without a message") from error
        return True
    if name != "_gated_attention_backward":
        check_forward(name, arguments, results)
    return False


def main(first: int, calls: int) -> None:
    import torch_gated_attn  # noqa: F401  # registers the operators

    warnings.simplefilter("ignore")
    # A result of many GiB is refused, rather than computed in memory that the system then takes back by force.
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    refused = 0
    for seed in range(first, first + calls):
        print(f"python tests/test_hostile.py {seed} 1", file=sys.stderr, flush=True)
        refused += attempt(seed)
    print(f"{calls} calls, {refused} refused")


def test_every_operator_called_with_garbage():
    command = [sys.executable, __file__, str(SEED), str(CALLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    said = f"exit code {done.returncode}, the call's own line and what it said:\n{done.stderr[-4000:]}"
    assert done.returncode == 0, said
    words = done.stdout.split()
    assert int(words[0]) == CALLS
    assert 0.3 * CALLS < int(words[2]) < 0.98 * CALLS, f"{done.stdout}: refusals and results should both occur"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(int(sys.argv[1]), int(sys.argv[2]))
