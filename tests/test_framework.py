# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch expects of an operator: opcheck, compile, export, transforms, autocast, checkpoint, meta tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from inputs import DIFFERENTIABLE, DTYPES, Inputs, assert_identical, draw, evaluate
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from torch_gated_attn import GatedAttention, gated_attention, gated_attention_with_lse, reference

OPS = torch.ops.torch_gated_attn

SAMPLES = {
    "plain": {"gate": None, "bias": None, "mask": None},
    "everything": {"mask": "full"},
    "shared bias": {"batch": (3,), "bias": (1, 2, 9, 11)},
    "multi-query": {"heads": 4, "kv_heads": 1},
    "two batch dimensions": {"batch": (2, 3), "bias": (2, 1, 2, 9, 11)},
    "no batch dimension": {"batch": (), "bias": (11,), "gate": "head"},
    "mean": {"masked_rows": "mean", "scale": 0.3},
    "Dv": {"dv": 5},
    "no keys": {"k": 0},
    "bfloat16": {"dtype": torch.bfloat16, "bias_dtype": torch.float32},
    "float64": {"dtype": torch.float64},
}


def arguments(sample: str, device: str) -> Inputs:
    return draw(**{"seed": 1, "device": device, **SAMPLES[sample]})


def lay_out(inputs: Inputs) -> Inputs:
    """[B, H, L, D] as views of [B, L, H, D]."""
    moved = {
        name: getattr(inputs, name).transpose(-2, -3).contiguous().transpose(-2, -3) for name in ("query", "key", "value")
    }
    return inputs.replace(**moved)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, sample, requires_grad):
    for layout in (lambda inputs: inputs, lay_out):
        inputs = layout(arguments(sample, device))
        if requires_grad:
            inputs = inputs.map(lambda x: x.detach().requires_grad_())
        for op in (OPS.gated_attention, OPS.gated_attention_with_lse):
            torch.library.opcheck(op, inputs.tensors, inputs.options)
        flat = (*inputs.tensors, inputs.scale, inputs.masked_rows)
        torch.library.opcheck(OPS._gated_attention_forward, flat)


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_of_the_backward(device, sample):
    inputs = arguments(sample, device)
    out, _, row_max, row_sum = OPS._gated_attention_forward(*inputs.tensors, inputs.scale, inputs.masked_rows)
    asked = [True, True, True, inputs.gate is not None, inputs.bias is not None]
    for grad_lse, grad_mask in ((inputs.grad_lse, asked), (None, [True, False, True, False, False])):
        flat = (inputs.grad_out, grad_lse, *inputs.tensors, out, row_max, row_sum)
        torch.library.opcheck(OPS._gated_attention_backward, (*flat, inputs.scale, inputs.masked_rows, grad_mask))


def layouts(x: Tensor) -> list[Tensor]:
    orders = itertools.permutations(range(x.dim()))
    return [x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())]) for order in orders]


@pytest.mark.parametrize("sample", SAMPLES)
def test_meta_equals_real(device, sample):
    """Shape, dtype and strides of results and gradients, for every order of query's dimensions in memory."""
    base = arguments(sample, device)
    queries = [*layouts(base.query), base.query[..., :1, :].expand_as(base.query)]
    for query in queries:
        inputs = base.replace(query=query)
        flat = (*inputs.tensors, inputs.scale, inputs.masked_rows)
        real = OPS._gated_attention_forward(*flat)
        on_meta = [x.to("meta") if isinstance(x, Tensor) else x for x in flat]
        # Tensor.to keeps the strides of a dense tensor only.
        on_meta[0] = torch.empty_strided(query.shape, query.stride(), dtype=query.dtype, device="meta")
        compare_meta(real, OPS._gated_attention_forward(*on_meta))
        grad_mask = [True, True, True, inputs.gate is not None, inputs.bias is not None]
        tail = (inputs.scale, inputs.masked_rows, grad_mask)
        tensors = (inputs.grad_out, inputs.grad_lse, *inputs.tensors, real[0], *real[2:])
        fakes = [
            None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors
        ]
        compare_meta(OPS._gated_attention_backward(*tensors, *tail), OPS._gated_attention_backward(*fakes, *tail))


def compare_meta(real: tuple[Tensor | None, ...], fake: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(real, fake, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype, b.device.type) == (b.shape, b.dtype, "meta")
            strides = [(x.stride(d) for d in range(x.dim()) if x.size(d) > 1) for x in (a, b)]
            assert a.numel() == 0 or list(strides[0]) == list(strides[1])


def test_meta_of_sizes_that_no_machine_holds():
    big = 2**20
    query = torch.empty(big, 8, big, 32, device="meta")
    bias = torch.empty(1, 8, big, big, device="meta", requires_grad=True)
    out, lse = gated_attention_with_lse(query, query, query, None, bias)
    assert out.shape == query.shape
    assert lse.shape == (big, 8, big)
    (grad,) = torch.autograd.grad(out, bias, torch.empty_like(out))
    assert grad.shape == bias.shape


@pytest.mark.parametrize("sample", SAMPLES)
def test_compile_of_the_whole_graph(device, sample):
    torch._dynamo.reset()

    inputs = arguments(sample, device)
    options = inputs.options

    def operator(*tensors, **_):
        out, lse = gated_attention_with_lse(*tensors, **options)
        return out * 1.5, lse

    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    expected, results = evaluate(operator, inputs), evaluate(compiled, inputs)
    assert_identical(expected, results, "compiled")


def test_compile_with_dynamic_sizes_compiles_once(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: gated_attention_with_lse(*args), fullgraph=True, dynamic=True, backend=counter)
    # Sizes that are equal in the first call would be taken for one size.
    for batch, q, k in ((3, 9, 11), (5, 20, 33), (4, 7, 19), (7, 64, 65)):
        inputs = draw(seed=q, device=device, batch=(batch,), q=q, k=k, bias=(1, 2, q, k))
        assert_identical(evaluate(gated_attention_with_lse, inputs), evaluate(lambda *a, **_: compiled(*a), inputs), (q, k))
    assert counter.frame_count == 1


def test_compile_of_the_module_by_inductor(device):
    torch._dynamo.reset()
    module = GatedAttention(16, 4, device=device, zero_init=False)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(2, 1, 7, dtype=torch.bool, device=device)
    mask[:, :, 5:] = False
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=mask), module(x, mask=mask), rtol=1e-5, atol=1e-6)
    grads, expected = (
        torch.autograd.grad(f(x, mask=mask).square().sum(), list(module.parameters())) for f in (compiled, module)
    )
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Call(torch.nn.Module):
    def forward(self, query, key, value, gate, bias, mask):
        return gated_attention(query, key, value, gate, bias, mask)


def test_export_with_dynamic_sizes(device):
    batch, q, k = (torch.export.Dim(name, min=2, max=4096) for name in ("batch", "q", "k"))
    dynamic = {
        "query": {0: batch, 2: q},
        "key": {0: batch, 2: k},
        "value": {0: batch, 2: k},
        "gate": {0: batch, 2: q},
        "bias": {2: q, 3: k},
        "mask": {0: batch, 3: k},
    }
    inputs = draw(seed=1, device=device, batch=(3,), q=9, k=11, bias=(1, 2, 9, 11))
    program = torch.export.export(Call(), inputs.tensors, dynamic_shapes=dynamic)
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert any("torch_gated_attn" in str(target) for target in calls), calls
    for decomposed in (program, program.run_decompositions()):
        for sizes in ({"batch": (3,), "q": 9, "k": 11}, {"batch": (5,), "q": 21, "k": 40}):
            other = draw(seed=2, device=device, bias=(1, 2, sizes["q"], sizes["k"]), **sizes)
            assert torch.equal(decomposed.module()(*other.tensors), gated_attention(*other.tensors))


def test_export_of_the_module(device, tmp_path):
    module = GatedAttention(16, 4, device=device, zero_init=False)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(device)
    length = torch.export.Dim("length", min=2, max=1024)
    program = torch.export.export(module, (x,), dynamic_shapes={"q_data": {1: length}})
    torch.export.save(program, str(tmp_path / "module.pt2"))
    loaded = torch.export.load(str(tmp_path / "module.pt2")).module()
    longer = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(1)).to(device)
    for y in (x, longer):
        assert torch.equal(loaded(y), module(y))


IN_DIMS = {
    "everything": (0, 0, 0, 0, 0, 0),
    "only query": (0, None, None, None, None, None),
    "inner dimensions": (1, 2, 0, -1, 1, 2),
    "only bias": (None, None, None, None, 0, None),
    "only mask": (None, None, None, None, None, 1),
    "gate and mask": (None, None, None, 0, None, 0),
}


@pytest.mark.parametrize("case", IN_DIMS)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap(device, case):
    """Mapped calls equal a loop, in values and in gradients, without falling back to one."""
    n, in_dims = 3, IN_DIMS[case]
    calls = [draw(seed=seed, dtype=torch.float64, device=device, bias=(2, 9, 11), mask=(2, 1, 1, 11)) for seed in range(n)]
    stacked = [
        calls[0].tensors[i].clone() if dim is None else torch.stack([call.tensors[i] for call in calls], dim)
        for i, dim in enumerate(in_dims)
    ]
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in stacked]
    mapped = torch.vmap(gated_attention_with_lse, in_dims=in_dims)(*leaves)
    looped = [
        gated_attention_with_lse(*(x if dim is None else x.select(dim, i) for x, dim in zip(leaves, in_dims, strict=True)))
        for i in range(n)
    ]
    expected = [torch.stack(parts) for parts in zip(*looped, strict=True)]
    for a, b in zip(mapped, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    cotangents = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype).to(device) for x in expected
    ]
    for a, b in zip(*(torch.autograd.grad(x, leaves[:5], cotangents) for x in (mapped, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap_twice(device):
    inputs = draw(seed=3, dtype=torch.float64, device=device, batch=(3, 4, 2), mask="full")
    mapped = torch.vmap(torch.vmap(gated_attention))(*inputs.tensors)
    torch.testing.assert_close(mapped, gated_attention(*inputs.tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_batched_gradients(device):
    """A batch of cotangents through one graph, as jacobian(vectorize=True) does; the bias and the gate broadcast."""
    inputs = draw(seed=4, dtype=torch.float64, device=device, bias=(2, 9, 1), gate=(2, 1, 1), kv_heads=1)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    out, lse = gated_attention_with_lse(*leaves, inputs.mask)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(4, *x.shape, generator=generator, dtype=x.dtype).to(device) for x in (out, lse)]
    batched = torch.autograd.grad((out, lse), leaves, cotangents, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        single = torch.autograd.grad((out, lse), leaves, [c[i] for c in cotangents], retain_graph=True)
        for a, b in zip(batched, single, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jacrev", "jacfwd", "hessian", "jvp", "vjp"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_transforms_of_torch_func(device, transform):
    inputs = draw(seed=6, dtype=torch.float64, device=device, batch=(2,), heads=2, kv_heads=1, q=3, k=4, d=3, mask="full")
    args = inputs.tensors[:5]
    every = tuple(range(5))
    generator = torch.Generator().manual_seed(7)
    tangents = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for x in args)

    def apply(function):
        whole = lambda *a: function(*a, inputs.mask)  # noqa: E731
        scalar = lambda *a: (whole(*a) * inputs.grad_out).sum()  # noqa: E731
        if transform == "grad":
            return torch.func.grad(scalar, every)(*args)
        if transform == "vmap of grad":
            per_entry = lambda *a: (function(*a[:6]) * a[6]).sum()  # noqa: E731
            return torch.vmap(torch.func.grad(per_entry, every))(*args, inputs.mask, inputs.grad_out)
        if transform == "jacrev":
            return torch.func.jacrev(whole, every)(*args)
        if transform == "jacfwd":
            return torch.func.jacfwd(whole, every)(*args)
        if transform == "hessian":
            return torch.func.hessian(scalar, every)(*args)
        if transform == "jvp":
            return torch.func.jvp(whole, args, tangents)
        out, pullback = torch.func.vjp(whole, *args)
        return out, pullback(inputs.grad_out)

    ours, theirs = apply(gated_attention), apply(reference.gated_attention)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_forward_mode(device):
    inputs = draw(seed=8, dtype=torch.float64, device=device, mask="full")
    generator = torch.Generator().manual_seed(7)
    tangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for x in inputs.tensors[:5]]
    results = []
    for function in (gated_attention_with_lse, reference.gated_attention_with_lse):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(inputs.tensors[:5], tangents, strict=True)]
            unpacked = [torch.autograd.forward_ad.unpack_dual(x) for x in function(*duals, inputs.mask)]
            results.append([(primal.clone(), tangent.clone()) for primal, tangent in unpacked])
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


def test_autocast(device):
    inputs = draw(seed=9, device=device, lse=False)
    with torch.autocast(device, torch.bfloat16):
        out, lse = gated_attention_with_lse(*inputs.tensors)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    low = {name: getattr(inputs, name).bfloat16() for name in ("query", "key", "value", "gate")}
    expected = gated_attention(*inputs.replace(**low).tensors)  # the bias stays float32
    assert torch.equal(out, expected)

    leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
    with torch.autocast(device, torch.bfloat16):
        out = gated_attention(*leaves, inputs.mask)
    out.backward(inputs.grad_out.bfloat16())
    for leaf in leaves:
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad != 0).any()

    double = inputs.to(torch.float64)
    with torch.autocast(device, torch.bfloat16):
        assert gated_attention(*double.tensors).dtype == torch.float64


def test_autocast_of_the_module(device):
    module = GatedAttention(16, 4, device=device, zero_init=False)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = module(x, bias=bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x, bias=bias), rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device, use_reentrant):
    inputs = draw(seed=10, device=device)

    def checkpointed(*tensors, **_):
        return checkpoint(gated_attention_with_lse, *tensors, use_reentrant=use_reentrant)

    if use_reentrant:  # it does not take part in autograd.grad
        leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
        torch.autograd.backward(checkpointed(*leaves, inputs.mask), (inputs.grad_out, inputs.grad_lse))
        results = {f"d_{name}": leaf.grad for name, leaf in zip(DIFFERENTIABLE, leaves, strict=True)}
        expected = evaluate(gated_attention_with_lse, inputs)
        assert_identical({name: expected[name] for name in results}, results, "checkpoint")
    else:
        assert_identical(evaluate(gated_attention_with_lse, inputs), evaluate(checkpointed, inputs), "checkpoint")


def test_saved_tensor_hooks(device):
    inputs = draw(seed=11, device=device)
    packed = []

    def hooked(*tensors, **options):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.numel()) or x.clone(), lambda x: x):
            return gated_attention_with_lse(*tensors, **options)

    assert_identical(evaluate(gated_attention_with_lse, inputs), evaluate(hooked, inputs), "hooks")
    query, logits = inputs.query.numel(), inputs.bias.numel()
    assert packed
    assert max(packed) <= max(query, inputs.value.numel(), inputs.grad_out.numel(), logits)


def test_writing_into_the_result_is_noticed(device):
    """The backward reads out: changing it in place must raise, not give wrong gradients."""
    inputs = draw(seed=12, device=device, lse=False)
    query = inputs.query.detach().requires_grad_()
    out = gated_attention(*inputs.replace(query=query).tensors)
    scaled = out * 1.0
    scaled.mul_(2)
    scaled.sum().backward(retain_graph=True)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inference_mode_and_no_grad(device):
    inputs = draw(seed=13, device=device)
    expected = gated_attention(*inputs.tensors)
    leaves = inputs.replace(query=inputs.query.detach().requires_grad_())
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = gated_attention(*leaves.tensors)
        assert torch.equal(out, expected)
        assert not out.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_mode_changes_nothing(device, dtype, recwarn):
    inputs = draw(seed=14, dtype=dtype, device=device)
    expected = evaluate(gated_attention_with_lse, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert_identical(expected, evaluate(gated_attention_with_lse, inputs), "deterministic mode")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [warning for warning in recwarn if "determin" in str(warning.message)]


def test_schemas():
    """Exported programs and TorchScript files hold these: arguments may be added at the end, with defaults, never else."""
    optional = 'Tensor? gate=None, Tensor? bias=None, Tensor? mask=None, *, float? scale=None, str masked_rows="zero"'
    assert str(OPS.gated_attention.default._schema) == (
        f"torch_gated_attn::gated_attention(Tensor query, Tensor key, Tensor value, {optional}) -> Tensor"
    )
    assert str(OPS.gated_attention_with_lse.default._schema) == (
        f"torch_gated_attn::gated_attention_with_lse(Tensor query, Tensor key, Tensor value, {optional}) "
        "-> (Tensor out, Tensor lse)"
    )
    assert str(OPS._gated_attention_forward.default._schema) == (
        "torch_gated_attn::_gated_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? bias, "
        "Tensor? mask, float? scale, str masked_rows) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)"
    )
    assert str(OPS._gated_attention_backward.default._schema) == (
        "torch_gated_attn::_gated_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor value, Tensor? gate, Tensor? bias, Tensor? mask, Tensor out, Tensor row_max, Tensor row_sum, "
        "float? scale, str masked_rows, bool[5] grad_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def test_memory_stays_flat_through_errors_and_skipped_backwards(device):
    """200 iterations, some raising and some never reaching a backward: nothing accumulates."""
    resource = pytest.importorskip("resource")
    inputs = draw(seed=15, device=device, batch=(64,), q=64, k=64, d=32, bias=(1, 2, 64, 64))

    def iterate(n: int) -> None:
        for i in range(n):
            leaves = [x.detach().requires_grad_() for x in inputs.tensors[:5]]
            out = gated_attention(*leaves, inputs.mask)
            if i % 3 == 0:
                out.backward(inputs.grad_out)
            if i % 3 == 1:
                with pytest.raises(ValueError, match="masked_rows"):
                    gated_attention(*leaves, inputs.mask, masked_rows="nan")

    iterate(30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    iterate(200)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 * 1024, f"{grown} KiB more"
