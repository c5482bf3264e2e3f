# SPDX-License-Identifier: BSD-3-Clause
"""The contract of a PyTorch operator: opcheck, fake tensors that predict real ones, schemas that stay compatible."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from inputs import Inputs, draw
from samples import SAMPLES, draw_sample, memory_orders, strides
from torch import Tensor

from torch_gated_attn import _C, gated_attention_with_lse

OPS = torch.ops.torch_gated_attn


def forward_call(inputs: Inputs) -> tuple[object, ...]:
    return *inputs.tensors, inputs.scale, inputs.masked_rows, *inputs.visibility


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, sample, requires_grad):
    inputs = draw_sample(sample, device)
    if requires_grad:
        inputs = inputs.map(lambda x: x.detach().requires_grad_())
    for op in (OPS.gated_attention, OPS.gated_attention_with_lse):
        torch.library.opcheck(op, inputs.tensors, inputs.options)
    torch.library.opcheck(OPS._gated_attention_forward, forward_call(inputs))


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_of_the_backward(device, sample):
    inputs = draw_sample(sample, device)
    out, _, row_max, row_sum = OPS._gated_attention_forward(*forward_call(inputs))
    asked = [True, True, True, inputs.gate is not None, inputs.bias is not None]
    for grad_lse, grad_mask in ((inputs.grad_lse, asked), (None, [True, False, True, False, False])):
        flat = (inputs.grad_out, grad_lse, *inputs.tensors, out, row_max, row_sum)
        tail = (inputs.scale, inputs.masked_rows, grad_mask, *inputs.visibility)
        torch.library.opcheck(OPS._gated_attention_backward, (*flat, *tail))


# test_meta_equals_real compares them with every torch.
@pytest.mark.skipif(torch.__version__ < "2.14", reason="opcheck of older torch compares strides on CUDA only")
def test_opcheck_compares_strides():
    """The tests above would say nothing about strides if opcheck ignored them."""
    with torch.library._scoped_library("torch_gated_attn_test", "DEF") as library:
        library.define("copy(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
        library.impl("copy", torch.clone, "CPU")
        library.impl("copy", lambda x: x.new_empty(x.shape), "Meta")
        copy = torch.ops.torch_gated_attn_test.copy
        torch.library.opcheck(copy, (torch.randn(3, 4),), test_utils="test_faketensor")
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError, match=r"[Ss]tride"):
            torch.library.opcheck(copy, (torch.randn(3, 4).T,), test_utils="test_faketensor")


def fake(x: object) -> object:
    """`x` on the meta device; Tensor.to would keep the strides of dense tensors only."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def compare_meta(real: tuple[Tensor | None, ...], predicted: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(real, predicted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype, b.device.type) == (b.shape, b.dtype, "meta")
            assert strides(a) == strides(b)


@pytest.mark.parametrize("sample", SAMPLES)
def test_meta_equals_real(device, sample):
    """Shape, dtype and strides of results and gradients, for every order of query's dimensions in memory."""
    base = draw_sample(sample, device)
    grad_mask = [True, True, True, base.gate is not None, base.bias is not None]
    for query in memory_orders(base.query):
        inputs = base.replace(query=query)
        call = forward_call(inputs)
        out, lse, row_max, row_sum = OPS._gated_attention_forward(*call)
        compare_meta((out, lse, row_max, row_sum), OPS._gated_attention_forward(*map(fake, call)))
        tensors = (inputs.grad_out, inputs.grad_lse, *inputs.tensors, out, row_max, row_sum)
        call = (*tensors, inputs.scale, inputs.masked_rows, grad_mask, *inputs.visibility)
        compare_meta(OPS._gated_attention_backward(*call), OPS._gated_attention_backward(*map(fake, call)))


def test_fake_tensors_keep_the_device(device):
    inputs = draw(seed=2, device=device)
    with torch._subclasses.FakeTensorMode() as mode:
        out, lse = gated_attention_with_lse(*(mode.from_tensor(x) for x in inputs.tensors))
    assert (out.device.type, lse.device.type) == (device, device)
    assert (out.shape, lse.shape) == (inputs.query.shape, inputs.query.shape[:-1])


def test_meta_of_sizes_that_no_machine_holds():
    big = 2**20
    query = torch.empty(big, 8, big, 32, device="meta")
    bias = torch.empty(1, 8, big, big, device="meta", requires_grad=True)
    out, lse = gated_attention_with_lse(query, query, query, None, bias)
    assert out.shape == query.shape
    assert lse.shape == (big, 8, big)
    (grad,) = torch.autograd.grad(out, bias, torch.empty_like(out))
    assert grad.shape == bias.shape


def test_a_process_that_only_loaded_the_library_compiles_and_exports():
    """Shapes, autograd and autocast are in the library itself, so nothing is missing without the Python package."""
    program = f"""
        import sys, torch
        torch.ops.load_library({_C.__file__!r})
        op = torch.ops.torch_gated_attn.gated_attention

        class Call(torch.nn.Module):
            def forward(self, query, key, bias):
                return op(query, key, key, None, bias)

        def arguments(batch, length):
            shapes = (batch, 2, length, 8), (batch, 2, length + 2, 8), (2, length, length + 2)
            return [torch.randn(shape, requires_grad=True) for shape in shapes]

        compiled = torch.compile(Call(), fullgraph=True, dynamic=True, backend="aot_eager")
        dim = torch.export.Dim.AUTO
        dynamic = {{0: dim, 2: dim}}, {{0: dim, 2: dim}}, {{1: dim, 2: dim}}
        exported = torch.export.export(Call(), tuple(arguments(3, 9)), dynamic_shapes=dynamic)
        for sizes in ((3, 9), (5, 20)):
            x = arguments(*sizes)
            expected = Call()(*x)
            cotangent = torch.randn_like(expected)
            assert torch.equal(exported.module()(*x), expected)
            result = compiled(*x)
            assert torch.equal(result, expected)
            for a, b in zip(*(torch.autograd.grad(y, x, cotangent) for y in (result, expected))):
                assert torch.equal(a, b) and a.any()
        assert "torch_gated_attn" not in sys.modules
        print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.stdout.strip() == "done", done.stderr


# As recorded in exported programs and TorchScript files of earlier versions.
RECORDED_SCHEMAS = [
    "torch_gated_attn::gated_attention(Tensor query, Tensor key, Tensor value, Tensor? gate=None, Tensor? bias=None, "
    'Tensor? mask=None, *, float? scale=None, str masked_rows="zero") -> Tensor',
    "torch_gated_attn::gated_attention_with_lse(Tensor query, Tensor key, Tensor value, Tensor? gate=None, "
    'Tensor? bias=None, Tensor? mask=None, *, float? scale=None, str masked_rows="zero") -> (Tensor out, Tensor lse)',
    "torch_gated_attn::_gated_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? bias, "
    "Tensor? mask, float? scale, str masked_rows) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)",
    "torch_gated_attn::_gated_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    "Tensor value, Tensor? gate, Tensor? bias, Tensor? mask, Tensor out, Tensor row_max, Tensor row_sum, "
    "float? scale, str masked_rows, bool[5] grad_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
]
# What was appended since, which every name below has now: a later argument comes after these.
VISIBILITY = "bool is_causal=False, int? window=None, Tensor? key_lengths=None)"
RECORDED_SCHEMAS += [schema.replace(") ->", f", {VISIBILITY} ->", 1) for schema in RECORDED_SCHEMAS]


def is_compatible(schema: torch._C.FunctionSchema, recorded: str) -> bool:
    """Whether calls written for `recorded` run with `schema`: it may have more arguments, at the end, with defaults."""
    return bool(schema.is_backward_compatible_with(torch._C.parse_schema(recorded)))


def short(schema: str) -> str:
    return schema.split("::")[1].split("(")[0] + (", visibility" if VISIBILITY in schema else "")


@pytest.mark.parametrize("recorded", RECORDED_SCHEMAS, ids=short)
def test_schema_stays_compatible(recorded):
    name = recorded.split("::")[1].split("(")[0]
    schema = getattr(OPS, name).default._schema
    assert is_compatible(schema, recorded), f"{schema}\nis incompatible with\n{recorded}"


@pytest.mark.parametrize(
    ("old", "new", "compatible"),
    [
        ('str masked_rows="zero")', 'str masked_rows="zero", int window=0)', True),
        ('str masked_rows="zero")', 'str masked_rows="zero", int window)', False),
        ('str masked_rows="zero")', 'str masked_rows="mean")', False),
        (', str masked_rows="zero")', ")", False),
        ("Tensor? gate=None, Tensor? bias=None", "Tensor? bias=None, Tensor? gate=None", False),
        ("Tensor key", "Tensor keys", False),
        ("float? scale", "int? scale", False),
        ("-> Tensor", "-> (Tensor, Tensor)", False),
    ],
)
def test_incompatible_schemas_are_noticed(old, new, compatible):
    recorded = RECORDED_SCHEMAS[0]
    assert old in recorded
    assert is_compatible(torch._C.parse_schema(recorded.replace(old, new)), recorded) == compatible
