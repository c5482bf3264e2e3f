# SPDX-License-Identifier: BSD-3-Clause
"""Without Python: the programs of examples/cpp find the installed library, train a TorchScript module, serve a package."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from pages import ROOT, blocks, makes_package, run_example
from torch import Tensor

from torch_gated_attn import GatedAttention, gated_attention, gated_attention_with_lse

# Kept between runs: compiling the library takes minutes, ninja or make redo what has changed.
LIBRARY_BUILD = ROOT / "build" / f"cpp-test-torch-{torch.__version__}"
LEARNING_RATE = 0.1


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled programs."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    torch_root = f"-DTORCH_ROOT={Path(torch.__file__).parent}"
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    # The operators are the CPU's: a CUDA build belongs to the machine that has the device.
    run("cmake", "-S", ROOT, "-B", LIBRARY_BUILD, *generator, torch_root, "-DTORCH_GATED_ATTN_CUDA=OFF")
    run("cmake", "--build", LIBRARY_BUILD, "--parallel", jobs)
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", LIBRARY_BUILD, "--prefix", prefix)
    build = tmp_path_factory.mktemp("examples")
    run("cmake", "-S", ROOT / "examples/cpp", "-B", build, *generator, torch_root, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build, "--parallel", jobs)
    return build


def printed(output: str) -> dict[str, Tensor]:
    lines = (line.split() for line in output.splitlines())
    return {name: torch.tensor([float.fromhex(number) for number in numbers]) for name, *numbers in lines}


def compare(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        torch.testing.assert_close(
            results[name], value.flatten(), rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def expected_of_train(module: GatedAttention, q_data: Tensor, bias: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What examples/cpp/train.cpp prints, computed in Python."""

    def loss() -> Tensor:
        result: Tensor = module(q_data, mask=mask, bias=bias)
        return result.square().mean()

    before = loss()
    before.backward()
    expected = {"loss": before.detach()} | {name: p.grad.clone() for name, p in module.named_parameters()}
    torch.optim.SGD(module.parameters(), LEARNING_RATE).step()
    expected["loss_after"] = loss().detach()
    assert expected["loss_after"] < expected["loss"]
    query = q_data.unsqueeze(-3).requires_grad_()
    expected["out"], expected["lse"] = gated_attention_with_lse(query, query, query, query)
    (expected["d_query"],) = torch.autograd.grad(expected["out"].sum() + expected["lse"].sum(), query)
    no_keys = torch.zeros(1, dtype=torch.bool)
    expected["mean_rows"] = gated_attention(query, query, query, mask=no_keys, scale=1.0, masked_rows="mean")
    lengths = torch.full(query.shape[:1], 4)
    expected["causal"] = gated_attention(query, query, query, is_causal=True, window=2, key_lengths=lengths)
    return {name: value.detach() for name, value in expected.items()}


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")  # the module's checks of its arguments
def test_cpp_program_trains_as_python_does(programs: Path, tmp_path: Path, how: str) -> None:
    module = GatedAttention(8, 2, zero_init=False, q_bias=True)
    q_data, bias, mask = torch.randn(3, 5, 8), torch.randn(2, 5, 5), torch.rand(3, 1, 5) > 0.3
    traced = torch.jit.script(module) if how == "script" else torch.jit.trace(module, (q_data, q_data, mask, bias))
    traced.save(str(tmp_path / "module.pt"))
    torch.save([q_data, bias, mask], tmp_path / "inputs.pt")
    output = run(programs / "train", tmp_path / "module.pt", tmp_path / "inputs.pt", str(LEARNING_RATE))
    compare(printed(output), expected_of_train(module, q_data, bias, mask))


def test_programs_need_no_python(programs: Path) -> None:
    for name in ("train", "serve"):
        libraries = run("ldd", programs / name)
        assert "libpython" not in libraries
        assert "libtorch_gated_attn.so" in libraries


def draw_arguments(batch: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    mask = torch.rand(batch, 1, length) > 0.3
    mask[..., 0] = True
    return torch.randn(batch, length, 16), {"mask": mask, "bias": torch.randn(4, length, length)}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[GatedAttention, Path]:
    """The module and the package, for any batch and length, of the example in docs/pytorch.md."""
    (example,) = filter(makes_package, blocks("docs/pytorch.md"))
    folder = tmp_path_factory.mktemp("package")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        module = run_example("docs/pytorch.md", example)["module"]
    return module, folder / "attention.pt2"


def test_package_in_python(package: tuple[GatedAttention, Path]) -> None:
    module, path = package
    loaded = torch._inductor.aoti_load_package(str(path))
    for batch, length in ((3, 7), (5, 40)):
        q_data, arguments = draw_arguments(batch, length)
        torch.testing.assert_close(loaded(q_data, **arguments), module(q_data, **arguments), rtol=1e-6, atol=1e-6)


class Decoder(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
        return gated_attention(query, key, key, query, is_causal=True, window=5, key_lengths=lengths)


def test_package_with_lengths(tmp_path: Path) -> None:
    def arguments(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        key = torch.randn(batch, 2, length, 8)
        return torch.randn(batch, 2, 3, 8), key, torch.randint(1, length + 1, (batch,))

    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=4096)
    shapes = {"query": {0: batch}, "key": {0: batch, 2: length}, "lengths": {0: batch}}
    program = torch.export.export(Decoder(), arguments(3, 7), dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "decoder.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for drawn in (arguments(3, 7), arguments(5, 40)):
        assert torch.equal(loaded(*drawn), Decoder()(*drawn))


def test_package_in_cpp(package: tuple[GatedAttention, Path], programs: Path, tmp_path: Path) -> None:
    module, path = package
    q_data, arguments = draw_arguments(5, 12)
    torch.save([q_data, *arguments.values()], tmp_path / "inputs.pt")
    results = printed(run(programs / "serve", path, tmp_path / "inputs.pt"))
    compare(results, {"result": module(q_data, **arguments)})


def test_package_with_other_strides(
    package: tuple[GatedAttention, Path], programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's packages read any memory as that of the example, unless they are told to check."""
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
    q_data, arguments = draw_arguments(3, 7)
    torch.save([q_data.transpose(0, 1).contiguous().transpose(0, 1), *arguments.values()], tmp_path / "inputs.pt")
    with pytest.raises(AssertionError, match="stride"):
        run(programs / "serve", package[1], tmp_path / "inputs.pt")
