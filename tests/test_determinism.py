# SPDX-License-Identifier: BSD-3-Clause
"""The same bits every time, for any number of threads, and accurate on every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from inputs import DTYPES, assert_identical, draw, evaluate
from torch.utils.data import DataLoader, Dataset

from torch_gated_attn import _C, gated_attention_with_lse

# Enough work for every thread, in each way it can be shared out: over batch entries, over heads, over queries, over the
# entries that share one bias, and over the keys of the forward or the queries of the backward, which are then put together.
CAUSAL = {"is_causal": True, "bias": None, "mask": None}
LENGTHS = {"key_lengths": [90, 0, 33, 64], "bias": (1, 2, 1, 90)}
CALLS = {
    "batch": {"batch": (7,), "heads": 3, "q": 70, "k": 90, "d": 16, "bias": (1, 3, 70, 90)},
    "one long sequence": {"batch": (), "heads": 1, "q": 300, "k": 257, "d": 32, "bias": (1, 300, 257)},
    "multi-query": {"batch": (2,), "heads": 6, "kv_heads": 1, "q": 65, "k": 130, "d": 24, "bias": (65, 130)},
    "one query": {"batch": (64,), "heads": 4, "q": 1, "k": 33, "d": 8, "bias": (1, 4, 1, 33)},
    "two groups of rows": {"batch": (3, 5), "heads": 2, "q": 40, "k": 40, "d": 8, "bias": (3, 1, 2, 40, 40)},
    "bias of keys": {"batch": (5,), "heads": 2, "q": 40, "k": 40, "d": 8, "bias": (1, 1, 1, 40)},
    "causal": {"batch": (2,), "heads": 4, "kv_heads": 2, "q": 150, "k": 170, "d": 16, **CAUSAL},
    "window, lengths, bias of all rows": {"batch": (4,), "q": 70, "k": 90, "window": 33, "is_causal": True, **LENGTHS},
    "keys in parts": {"batch": (1,), "heads": 2, "q": 20, "k": 1100, "bias": (20, 1100), "is_causal": True},
    "keys of few queries in parts": {"batch": (1,), "heads": 4, "kv_heads": 1, "q": 1, "k": 1700, "d": 64, **CAUSAL},
    "queries in parts": {"batch": (), "heads": 1, "q": 600, "k": 70, "bias": (1, 70), "is_causal": True},
    "gate of heads": {"batch": (5,), "heads": 2, "q": 40, "k": 40, "d": 8, "gate": (1, 2, 1, 1)},
}


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_number_of_threads(restore_threads, dtype, call):
    inputs = draw(seed=1, dtype=dtype, **CALLS[call])
    results = {}
    for threads in (1, 2, 3, 4, 8):
        torch.set_num_threads(threads)
        results[threads] = evaluate(gated_attention_with_lse, inputs)
        assert_identical(results[1], results[threads], f"{threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs(device, dtype):
    for name, sizes in CALLS.items():
        inputs = draw(seed=2, dtype=dtype, device=device, **sizes)
        first = evaluate(gated_attention_with_lse, inputs)
        for _ in range(10):
            assert_identical(first, evaluate(gated_attention_with_lse, inputs), name)


def test_python_threads_at_once():
    """Eight threads, each with its own call, all at the same time."""
    calls = [draw(seed=seed, dtype=DTYPES[seed % 4], **list(CALLS.values())[seed % len(CALLS)]) for seed in range(8)]
    expected = [evaluate(gated_attention_with_lse, call) for call in calls]
    barrier = threading.Barrier(len(calls))

    def work(call):
        barrier.wait()
        return [evaluate(gated_attention_with_lse, call) for _ in range(5)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for i, results in enumerate(pool.map(work, calls)):
            for result in results:
                assert_identical(expected[i], result, f"thread {i}")


def test_backward_twice_and_from_another_thread():
    inputs = draw(seed=3, **CALLS["batch"])
    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    out, lse = gated_attention_with_lse(*leaves, inputs.mask)

    def gradients():
        grads = torch.autograd.grad((out, lse), leaves, (inputs.grad_out, inputs.grad_lse), retain_graph=True)
        return {str(i): grad for i, grad in enumerate(grads)}

    first = gradients()
    assert_identical(first, gradients(), "a second backward")
    with ThreadPoolExecutor(2) as pool:
        for other in [future.result() for future in [pool.submit(gradients) for _ in range(2)]]:
            assert_identical(first, other, "a backward in another thread")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use():
    """A forked worker (as of a DataLoader) can use the operator though its parent did."""
    program = """
import os, torch
import torch_gated_attn
x = torch.randn(4, 2, 64, 16)
before = torch_gated_attn.gated_attention(x, x, x)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # GNU OpenMP cannot start threads after a fork
    os._exit(0 if torch.equal(torch_gated_attn.gated_attention(x, x, x), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


class Batches(Dataset):
    """Each item is computed by the operator; item 5 is an invalid call."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        x = torch.full((2, 9, 4), 1.0 + i)
        return gated_attention_with_lse(x, x, x[:1] if i == 5 else x)[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_of_a_data_loader():
    """Forked after use, they compute the same, and an exception in one reaches the loop."""
    expected = [Batches()[i] for i in range(5)]
    loader = iter(DataLoader(Batches(), batch_size=None, num_workers=2, timeout=120))
    for right in expected:
        assert torch.equal(next(loader), right)
    with pytest.raises(ValueError, match="value must have as many heads as key"):
        next(loader)
    assert torch.equal(Batches()[0], expected[0])


def test_exceptions_in_threads_propagate():
    """Of the call itself, and of a hook that runs amid a backward: each reaches its caller, and the next call is right."""
    inputs = draw(seed=5, **CALLS["batch"])
    expected = evaluate(gated_attention_with_lse, inputs)

    def invalid():
        gated_attention_with_lse(*inputs.replace(value=inputs.value[:1]).tensors)

    def interrupted():
        query = inputs.query.clone().requires_grad_()
        out, _ = gated_attention_with_lse(query, *inputs.tensors[1:])
        out.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("from a hook")))
        out.sum().backward()

    with ThreadPoolExecutor(4) as pool:
        for wrong, exception, message in (
            (invalid, ValueError, "value must have"),
            (interrupted, RuntimeError, "from a hook"),
        ):
            futures = [pool.submit(wrong) for _ in range(4)]
            right = [pool.submit(evaluate, gated_attention_with_lse, inputs) for _ in range(2)]
            for future in futures:
                with pytest.raises(exception, match=message):
                    future.result(timeout=300)
            for future in right:
                assert_identical(expected, future.result(timeout=300), "beside a failing call")


FILES = (
    "test_numerics.py",
    "test_masks.py",
    "test_special.py",
    "test_protected_pages.py",
    "test_visibility.py",
    "test_hidden_keys.py",
)
ACCURACY = (
    "head_dims or heads_and_batch or diagonal or fully_masked or leave_no_trace or every_subset or large_logits "
    "or protected_pages or random_calls_around_tiles or in_parts or block_sparse"
)


@pytest.mark.parametrize("capability", _C.cpu_capabilities)
def test_every_other_instruction_set(capability):
    """The accuracy tests again, in a process with each other instruction set that the machine has."""
    if capability == cpu_capability(os.environ):
        pytest.skip("the other tests run with it")
    environment = {**os.environ, "TORCH_GATED_ATTN_CPU_CAPABILITY": capability}
    taken = cpu_capability(environment)
    if taken != capability:
        pytest.skip(f"this machine lacks it: {taken} is taken")
    tests = [str(Path(__file__).with_name(name)) for name in FILES]
    run = run_python(environment, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", ACCURACY, *tests)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def test_unknown_instruction_set():
    program = "import torch, torch_gated_attn as t; x = torch.ones(1, 1, 1); t.gated_attention(x, x, x)"
    run = run_python({**os.environ, "TORCH_GATED_ATTN_CPU_CAPABILITY": "sse9"}, "-c", program)
    assert run.returncode == 1
    *others, last = _C.cpu_capabilities
    expected = f"TORCH_GATED_ATTN_CPU_CAPABILITY must be {', '.join(others)} or {last}, but is 'sse9'"
    assert expected in run.stderr


def run_python(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def cpu_capability(environment: Mapping[str, str]) -> str:
    run = run_python(environment, "-c", "from torch_gated_attn import _C; print(_C.cpu_capability())")
    return run.stdout.strip()
