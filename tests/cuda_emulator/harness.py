# SPDX-License-Identifier: BSD-3-Clause
"""Runs the emulated CUDA kernels on torch CPU tensors, through the torch-free Problem of csrc/problem.h."""

import contextlib
import ctypes
import math

import torch

from . import kernels

LAUNCHED: set[kernels.Kernel] = set()  # by all calls so far; who wants to know clears it
TILES: list[kernels.Tile] | None = None  # computed by all calls so far, where somebody wants to know
MAX_BATCH_DIMS = 4
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64 * MAX_BATCH_DIMS)] + [
        (name, ctypes.c_int64) for name in ("head", "row", "col")
    ]


class Problem(ctypes.Structure):
    _fields_ = (
        [("dtype", ctypes.c_uint8), ("bias_dtype", ctypes.c_uint8), ("batch", ctypes.c_int64 * MAX_BATCH_DIMS)]
        + [
            (name, ctypes.c_int64)
            for name in ("outer", "rows", "heads", "kv_heads", "q_len", "k_len", "head_dim", "value_dim")
        ]
        + [
            ("scale", ctypes.c_double),
            ("mean_rows", ctypes.c_bool),
            ("is_causal", ctypes.c_bool),
            ("window", ctypes.c_int64),
        ]
        + [(name, View) for name in ("query", "key", "value", "gate", "bias", "mask", "out", "lse", "row_max", "row_sum")]
        + [("key_lengths", View)]
        + [(name, View) for name in ("grad_out", "grad_lse", "d_query", "d_key", "d_value", "d_gate", "d_bias")]
    )


class Report(ctypes.Structure):
    FINDINGS = ("races", "uninitialised", "out_of_bounds", "misaligned", "divergent", "bank_conflicts", "unrounded")
    _fields_ = [(name, ctypes.c_int64) for name in (*FINDINGS, "mma", "ldmatrix", "exp2")]

    def findings(self):
        return {name: getattr(self, name) for name in self.FINDINGS if getattr(self, name)}


class Finding(AssertionError):
    """The emulator caught the kernels doing something a GPU would not forgive."""


class Call:
    """One call's Problem; keeps the tensors alive and tells the emulator which memory may be touched."""

    def __init__(
        self,
        library,
        query,
        key,
        value,
        gate=None,
        bias=None,
        mask=None,
        *,
        scale=None,
        masked_rows="zero",
        is_causal=False,
        window=None,
        key_lengths=None,
    ):
        self.library = library
        self.problem = p = Problem()
        self.kept = []
        self.batch = tuple(query.shape[:-3])
        heads, q_len, head_dim = query.shape[-3:]
        kv_heads, k_len, value_dim = value.shape[-3:]
        p.dtype = DTYPES[query.dtype]
        p.bias_dtype = DTYPES[query.dtype if bias is None else bias.dtype]
        p.heads, p.kv_heads, p.q_len, p.k_len, p.head_dim, p.value_dim = heads, kv_heads, q_len, k_len, head_dim, value_dim
        p.scale = head_dim**-0.5 if scale is None else scale
        p.mean_rows = masked_rows == "mean"
        p.is_causal, p.window = is_causal, window or 0
        # Batch dimensions over which the bias is broadcast go innermost; they are the rows that share it.
        shared = [True] * len(self.batch)
        if bias is not None:
            strides = self.expanded(bias, (*self.batch, heads, q_len, k_len)).stride()
            shared = [n == 1 or strides[d] == 0 for d, n in enumerate(self.batch)]
        self.order = [d for d in range(len(self.batch)) if not shared[d]] + [d for d in range(len(self.batch)) if shared[d]]
        sizes = [self.batch[d] for d in self.order]
        p.rows = math.prod([self.batch[d] for d in self.order if shared[d]])
        p.outer = math.prod(self.batch) // max(p.rows, 1) if p.rows else 0
        p.batch[:] = [1] * (MAX_BATCH_DIMS - len(sizes)) + sizes
        self.shapes = {
            "query": (*self.batch, heads, q_len, head_dim),
            "key": (*self.batch, kv_heads, k_len, head_dim),
            "value": (*self.batch, kv_heads, k_len, value_dim),
            "out": (*self.batch, heads, q_len, value_dim),
            "scores": (*self.batch, heads, q_len, k_len),
            "rows": (*self.batch, heads, q_len),
            "entries": self.batch,
        }
        p.query = self.view(query, "query")
        p.key = self.view(key, "key")
        p.value = self.view(value, "value")
        p.gate = self.view(gate, "out")
        p.bias = self.view(bias, "scores")
        p.mask = self.view(mask, "scores")
        p.key_lengths = self.view(None if key_lengths is None else key_lengths.long(), "entries")

    @staticmethod
    def expanded(tensor, shape):
        return tensor.expand(shape)

    def view(self, tensor, shape, writable=False):
        result = View()
        if tensor is None or tensor.numel() == 0:
            return result
        full = tensor.expand(self.shapes[shape])
        strides = [0 if n == 1 else s for n, s in zip(full.shape, full.stride(), strict=True)]
        inner = strides[len(self.batch) :]
        inner += [0] * (3 - len(inner))
        result.data = full.data_ptr()
        result.batch[MAX_BATCH_DIMS - len(self.batch) :] = [strides[d] for d in self.order]
        result.head, result.row, result.col = inner
        if inner[-1] == 0 and full.dim() and full.shape[-1] == 1:
            result.col = 1
        span = sum((n - 1) * s for n, s in zip(full.shape, full.stride(), strict=True)) + 1
        self.kept.append((tensor, span * tensor.element_size(), writable))
        return result

    def run(self, function, *arguments):
        for tensor, size, writable in self.kept:
            self.library.emulator_allow(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size), int(writable))
        message = function(ctypes.byref(self.problem), *arguments).decode()
        LAUNCHED.update(kernels.parse(self.library.emulator_launched().decode()))
        if TILES is not None:
            TILES.extend(kernels.parse_tiles(self.library.emulator_tiles().decode()))
        report = self.library.emulator_report().contents
        if message or report.findings():
            raise Finding(f"{message} {report.findings()}")
        return report


@contextlib.contextmanager
def recorded_tiles():
    """A list that grows by the tiles that kernels compute within."""
    global TILES
    TILES = []
    try:
        yield TILES
    finally:
        TILES = None


def load(path):
    library = ctypes.CDLL(str(path))
    library.emulator_report.restype = ctypes.POINTER(Report)
    for name in ("emulator_forward", "emulator_backward", "emulator_explain", "emulator_launched", "emulator_tiles"):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_char_p
    assert library.emulator_problem_bytes() == ctypes.sizeof(Problem), "harness.py and csrc/problem.h disagree"
    return library


def poisoned(shape, dtype):
    """What a kernel must overwrite everywhere."""
    return torch.full(shape, math.nan, dtype=dtype)


def forward(library, *inputs, arch=90, seed=1, **options):
    """out, lse, row_max, row_sum of the emulated kernels; inputs and options are those of Call."""
    call = Call(library, *inputs, **options)
    query = inputs[0]
    out = poisoned(call.shapes["out"], query.dtype)
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse, row_max, row_sum = (poisoned(call.shapes["rows"], accumulate) for _ in range(3))
    call.problem.out = call.view(out, "out", writable=True)
    call.problem.lse = call.view(lse, "rows", writable=True)
    call.problem.row_max = call.view(row_max, "rows", writable=True)
    call.problem.row_sum = call.view(row_sum, "rows", writable=True)
    call.run(library.emulator_forward, arch, seed)
    return out, lse, row_max, row_sum


NAMES = ("query", "key", "value", "gate", "bias")


def backward(
    library,
    saved,
    grad_out,
    grad_lse,
    query,
    key,
    value,
    gate=None,
    bias=None,
    mask=None,
    wanted=NAMES,
    arch=90,
    seed=1,
    **options,
):
    """Gradients by name, of those `wanted`; `saved` is what forward() returned."""
    out, _, row_max, row_sum = saved
    call = Call(library, query, key, value, gate, bias, mask, **options)
    p = call.problem
    p.out, p.row_max, p.row_sum = call.view(out, "out"), call.view(row_max, "rows"), call.view(row_sum, "rows")
    p.grad_out, p.grad_lse = call.view(grad_out, "out"), call.view(grad_lse, "rows")
    shapes = {"query": "query", "key": "key", "value": "value", "gate": "out", "bias": "scores"}
    tensors = {"query": query, "key": key, "value": value, "gate": gate, "bias": bias}
    gradients = {n: poisoned(tensors[n].shape, tensors[n].dtype) for n in NAMES if n in wanted and tensors[n] is not None}
    reduced_gate = False
    if "gate" in gradients:
        # As the launcher does: a gate broadcast along anything but its columns is summed outside, in the accumulation type.
        full = tuple(call.shapes["out"])
        reduced_gate = tuple(gate.shape) not in (full, (*full[:-1], 1))
        if reduced_gate:
            gradients["gate"] = poisoned((*full[:-1], gate.shape[-1] if gate.dim() else 1), row_max.dtype)
    for name, gradient in gradients.items():
        setattr(p, f"d_{name}", call.view(gradient, shapes[name], writable=True))
    call.run(library.emulator_backward, arch, seed, int(reduced_gate))
    if reduced_gate:
        gradients["gate"] = gradients["gate"].sum_to_size(gate.shape).to(gate.dtype)
    return gradients
