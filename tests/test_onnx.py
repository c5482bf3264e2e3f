# SPDX-License-Identifier: BSD-3-Clause
"""The ONNX graph computes what the operator does, for sizes other than those at export."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from inputs import Inputs, draw
from torch import Tensor, nn

from torch_gated_attn import GatedAttention, gate_output, gated_attention_with_lse

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from torch_gated_attn.onnx import TRANSLATION_TABLE  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ONNX model has different number of inputs:UserWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning"),
]

CASES = {
    "everything": {"mask": "full"},
    "plain": {"gate": None, "bias": None, "mask": None},
    "grouped heads, two batch dimensions": {"batch": (2, 3), "heads": 4, "kv_heads": 2, "bias": (4, 9, 11), "dv": 5},
    "masked rows, mean": {"masked_rows": "mean", "scale": 0.3, "dead": True},
    "masked rows, zero": {"dead": True},
    "no batch dimension": {"batch": (), "bias": (11,), "gate": "head"},
    "float16, float32 bias": {"dtype": torch.float16, "bias_dtype": torch.float32},
    "float64": {"dtype": torch.float64},
}


class Call(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.options, self.absent = inputs.options, [x is None for x in inputs.tensors]

    def forward(self, *present: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(present)
        return gated_attention_with_lse(*(None if absent else next(rest) for absent in self.absent), **self.options)


def draw_case(case: str, **changes: object) -> Inputs:
    sizes = {"seed": 1, **CASES[case], **changes}
    dead = sizes.pop("dead", False)
    inputs = draw(**sizes)
    if dead:
        inputs.mask[0] = False
    return inputs


def session(program: torch.onnx.ONNXProgram, path: str) -> object:
    domains = {node.domain for node in program.model.graph}
    assert domains == {""}, "the graph has operators that are not standard"
    program.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def execute(onnx: object, tensors: list[Tensor]) -> list[Tensor]:
    names = [value.name for value in onnx.get_inputs()]
    assert len(names) == len(tensors)
    feed = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
    return [torch.from_numpy(result) for result in onnx.run(None, feed)]


@pytest.mark.parametrize("case", CASES)
def test_operator(case, tmp_path):
    inputs = draw_case(case)
    tensors = [x for x in inputs.tensors if x is not None]
    call = Call(inputs)
    program = torch.onnx.export(
        call, tuple(tensors), dynamo=True, verbose=False, custom_translation_table=TRANSLATION_TABLE
    )
    results = execute(session(program, str(tmp_path / "call.onnx")), tensors)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}[inputs.query.dtype]
    for result, expected in zip(results, call(*tensors), strict=True):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_module_with_dynamic_sizes(tmp_path):
    module = GatedAttention(16, 4, zero_init=False).eval()

    def arguments(batch: int, length: int) -> tuple[Tensor, None, Tensor, Tensor]:
        mask = torch.rand(batch, 1, length) > 0.3
        mask[0] = False
        return torch.randn(batch, length, 16), None, mask, torch.randn(4, length, length)

    batch, length = (torch.export.Dim(name, min=2, max=4096) for name in ("batch", "length"))
    program = torch.onnx.export(
        module,
        arguments(3, 7),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch, 1: length}, None, {0: batch, 2: length}, {1: length, 2: length}),
        custom_translation_table=TRANSLATION_TABLE,
    )
    onnx = session(program, str(tmp_path / "module.onnx"))
    for sizes in ((3, 7), (5, 40)):
        args = arguments(*sizes)
        (result,) = execute(onnx, [x for x in args if x is not None])
        torch.testing.assert_close(result, module(*args), rtol=1e-5, atol=1e-5)


class Decoder(nn.Module):
    """What another attention's result is gated by, and everything about positions."""

    def __init__(self, window: int | None, masked_rows: str) -> None:
        super().__init__()
        self.window, self.masked_rows = window, masked_rows

    def forward(self, query: Tensor, key: Tensor, gate: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor]:
        options = {"masked_rows": self.masked_rows, "is_causal": True, "window": self.window}
        out, lse = gated_attention_with_lse(query, key, key, key_lengths=key_lengths, **options)
        return gate_output(out, gate), lse


@pytest.mark.parametrize(("window", "masked_rows"), [(None, "zero"), (3, "mean"), (2**62, "zero")])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_causal_order_windows_and_lengths_of_any_size(window, masked_rows, integer, tmp_path):
    def arguments(batch: int, q: int, k: int) -> tuple[Tensor, ...]:
        x = draw(seed=q, batch=(batch,), heads=4, kv_heads=2, q=q, k=k)
        return x.query, x.key, x.gate, (torch.arange(batch) * 4 - 1).to(integer)

    batch, q, k = (torch.export.Dim(name, min=2, max=4096) for name in ("batch", "q", "k"))
    module = Decoder(window, masked_rows)
    program = torch.onnx.export(
        module,
        arguments(3, 7, 9),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch, 2: q}, {0: batch, 2: k}, {0: batch, 2: q}, {0: batch}),
        custom_translation_table=TRANSLATION_TABLE,
    )
    onnx = session(program, str(tmp_path / "decoder.onnx"))
    for sizes in ((3, 7, 9), (5, 40, 21), (2, 5, 33)):  # more queries than keys too
        args = arguments(*sizes)
        for result, expected in zip(execute(onnx, list(args)), module(*args), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_dynamic_head_dim_is_refused():
    inputs = draw(seed=1, gate=None, bias=None, mask=None)
    sizes = {3: torch.export.Dim("head_dim", min=2)}
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as error:
        torch.onnx.export(
            Call(inputs),
            inputs.tensors[:3],
            dynamo=True,
            verbose=False,
            dynamic_shapes=((sizes, sizes, None),),
            custom_translation_table=TRANSLATION_TABLE,
        )
    chain = []
    cause: BaseException | None = error.value
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    assert any("head_dim must be the same in every call of an ONNX graph, but is dynamic" in text for text in chain)


def test_importing_the_package_does_not_import_onnxscript():
    program = "import sys, torch_gated_attn; print('onnxscript' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"
