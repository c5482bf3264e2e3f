# SPDX-License-Identifier: BSD-3-Clause
"""gate_output(out, gate) = out * sigmoid(gate): values, gradients of any order, layouts, what PyTorch expects of an op."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES
from torch import Tensor

from torch_gated_attn import gate_output

OPS = torch.ops.torch_gated_attn
SHAPE = (2, 3, 7, 37)  # the last dimension: two vectors of AVX-512 and a rest, or more
GATES = {"full": SHAPE, "head": (2, 3, 7, 1), "shared": (3, 1, 37), "last": (37,), "one": (1, 1, 1, 1)}


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def arguments(gate: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return draw(SHAPE, dtype, device, 1), draw(GATES[gate], dtype, device, 2)


def with_gradients(function, out: Tensor, gate: Tensor, cotangent: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (out, gate)]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, cotangent)]


def plain(out: Tensor, gate: Tensor) -> Tensor:
    return out * torch.sigmoid(gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(device, gate, dtype):
    args = arguments(gate, dtype, device)
    cotangent = draw(SHAPE, dtype, device, 3)
    gold = with_gradients(plain, *(x.double() for x in (*args, cotangent)))
    low = with_gradients(plain, *args, cotangent)
    ours = with_gradients(gate_output, *args, cotangent)
    summed = gold[2].numel() < gold[0].numel()
    for name, result, reference, true in zip(("result", "d_out", "d_gate"), ours, low, gold, strict=True):
        assert (result.dtype, result.shape) == (dtype, true.shape)
        error, allowed = ((x.double() - true).abs().max() for x in (result, reference))
        eps = torch.finfo(dtype).eps
        # One rounding of each element, and in float32 those of exp; a broadcast gate's terms may cancel in their sum.
        unit = eps * (100 * 3**3 if name == "d_gate" and summed else 2 * true.abs().max())
        assert error <= allowed + unit, f"{name}: {error:.3g} against {allowed:.3g} + {unit:.3g}"


def layouts() -> dict[str, tuple[Tensor, Tensor]]:
    """As they come: heads after positions, the gate in the second half of a packed projection, transposed, expanded."""
    contiguous = draw(SHAPE, torch.float32, "cpu", 1)
    packed = draw((2, 7, 3, 2 * 37), torch.float32, "cpu", 2)
    return {
        "packed gate": (
            contiguous.transpose(1, 2).contiguous().transpose(1, 2),
            packed.chunk(2, -1)[1].transpose(1, 2),
        ),
        "out transposed in its last dimensions": (contiguous.mT.contiguous().mT, contiguous + 1),
        "gate transposed": (contiguous, (contiguous + 1).mT.contiguous().mT),
        "every second": (contiguous[..., ::2], draw(SHAPE, torch.float32, "cpu", 4)[..., ::2]),
        "expanded": (contiguous[:, :1].expand(SHAPE), contiguous[..., :1].expand(SHAPE)),
        "no elements": (contiguous[:0], contiguous[:0]),
        "no dimensions": (contiguous[0, 0, 0, 0], contiguous[1, 1, 1, 1]),
    }


@pytest.mark.parametrize("name", layouts())
def test_layouts(device, name):
    out, gate = (x.to(device) for x in layouts()[name])
    cotangent = draw(tuple(out.shape), torch.float32, device, 5)
    results = with_gradients(gate_output, out, gate, cotangent)
    # In float64, as PyTorch's gradient of sigmoid cancels at large gates.
    for result, true in zip(results, with_gradients(plain, out.double(), gate.double(), cotangent.double()), strict=True):
        torch.testing.assert_close(result, true.float(), rtol=2e-6, atol=1e-30)
    order = [sorted(range(x.dim()), key=x.stride, reverse=True) for x in (results[0], out)]
    assert order[0] == order[1] or name in ("expanded", "no elements")


def test_gate_half_of_a_projection_gets_its_gradient(device):
    packed = draw((2, 7, 3, 2 * 8), torch.float64, device, 1).requires_grad_()
    out = draw((2, 3, 7, 8), torch.float64, device, 2)
    result = gate_output(out, packed.chunk(2, -1)[1].transpose(1, 2))
    (grad,) = torch.autograd.grad(result.sum(), packed)
    assert (grad[..., :8] == 0).all()
    assert (grad[..., 8:] != 0).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_any_number_of_derivatives(device):
    out, gate = (x[:1, :2, :3, :4].clone().requires_grad_() for x in arguments("full", torch.float64, device))
    head = gate[..., :1].detach().requires_grad_()
    for args in ((out, gate), (out, head)):
        assert torch.autograd.gradcheck(gate_output, args, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(gate_output, args)
    jacobian = torch.func.jacrev(gate_output, argnums=1)(out, head)
    torch.testing.assert_close(jacobian, torch.func.jacrev(plain, argnums=1)(out, head))


@pytest.mark.parametrize("gate", ["full", "head", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, gate, dtype):
    out, gate = (x.requires_grad_() for x in arguments(gate, dtype, device))
    torch.library.opcheck(OPS.gate_output, (out, gate))
    transposed = out.detach().transpose(1, 2).contiguous().transpose(1, 2)
    for mask in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(OPS._gate_output_backward, (transposed, transposed, gate.detach(), mask))


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 2), (3, 0)])
def test_vmap(device, in_dims):
    out = draw((3, 3, 3, 3), torch.float64, device, 1)
    gate = draw((3, 3, 3, 3)[in_dims[1] is None :], torch.float64, device, 2)
    torch.testing.assert_close(torch.vmap(gate_output, in_dims)(out, gate), torch.vmap(plain, in_dims)(out, gate))

    def grads(function):
        return torch.vmap(torch.func.grad(lambda o, g: function(o, g).square().sum(), argnums=(0, 1)), in_dims)(out, gate)

    torch.testing.assert_close(grads(gate_output), grads(plain))


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 0), (None, None, 2)])
def test_vmap_of_the_backward(device, in_dims):
    """Gradients have the shape of their input, also where the gate has fewer dimensions than out."""
    tensors = [
        draw(shape, torch.float64, device, seed) for seed, shape in enumerate(((3, 3, 3, 3), (3, 3, 3, 3), (3, 3, 3)))
    ]
    args = [x if d is not None else x[0] for x, d in zip(tensors, in_dims, strict=True)]

    def backward(grad, out, gate):
        return OPS._gate_output_backward(grad, out, gate, [True, True])

    results = torch.vmap(backward, in_dims)(*args)
    for i in range(3):
        one = backward(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
        for result, expected in zip(results, one, strict=True):
            torch.testing.assert_close(result[i], expected)


def test_the_formula_that_runs_on_other_devices():
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    out, gate = arguments("head", torch.float32, "cpu")
    with torch.no_grad():
        result = OPS.gate_output.default._op_dk(key, out, gate)
        torch.testing.assert_close(result, gate_output(out, gate))
        grads = OPS._gate_output_backward.default._op_dk(key, out, out, gate, [True, True])
        expected = OPS._gate_output_backward(out, out, gate, [True, True])
    torch.testing.assert_close(grads, expected)


def test_autocast(device):
    out, gate = arguments("full", torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        result = gate_output(out, gate)
        assert gate_output(out.double(), gate.double()).dtype == torch.float64
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, gate_output(out.bfloat16(), gate.bfloat16()))


def test_same_bits_for_any_number_of_threads():
    shape = (64, 40, 33)  # beyond one thread's grain
    out, gate = draw(shape, torch.float32, "cpu", 1), draw((64, 40, 1), torch.float32, "cpu", 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(gate_output, out, gate, out + 1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_extremes(device):
    inf = torch.inf
    out = torch.tensor([1.0, 2.0, 3.0, torch.nan, 5.0], device=device, requires_grad=True)
    gate = torch.tensor([-inf, inf, -200.0, 0.0, torch.nan], device=device, requires_grad=True)
    result = gate_output(out, gate)
    assert result[:3].tolist() == [0.0, 2.0, 0.0]
    assert result[3:].isnan().all()
    d_out, d_gate = torch.autograd.grad(result.sum(), (out, gate))
    assert d_out[:4].tolist() == [0.0, 1.0, 0.0, 0.5]
    assert d_gate[:3].tolist() == [0.0, 0.0, 0.0]


def test_compiled(device):
    torch._dynamo.reset()
    args = arguments("head", torch.float32, device)
    compiled = torch.compile(gate_output, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, *args, args[0]), with_gradients(gate_output, *args, args[0]), strict=True):
        assert torch.equal(a, b)


ERRORS = {
    "gate must have out's dtype float32, but is float64": (torch.ones(2, 3), torch.ones(3).double()),
    "out must be float32, float64, bfloat16 or float16, but is int64": (torch.ones(2).long(), torch.ones(2).long()),
    "gate must be broadcastable to out's shape = [2, 3], but has shape [2, 2]": (torch.ones(2, 3), torch.ones(2, 2)),
    "gate must be broadcastable to out's shape = [3], but has shape [2, 3]": (torch.ones(3), torch.ones(2, 3)),
}


@pytest.mark.parametrize("message", ERRORS)
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_errors(message, place):
    with pytest.raises((TypeError, ValueError)) as error:
        gate_output(*(x.to(place) for x in ERRORS[message]))
    assert str(error.value).splitlines()[0] == message
