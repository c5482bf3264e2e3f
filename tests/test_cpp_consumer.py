# SPDX-License-Identifier: BSD-3-Clause
"""A C++ program without Python: finds the installed library, loads a scripted module, trains it, calls the C++ function."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import torch_gated_attn

ROOT = Path(__file__).resolve().parents[1]
# Kept between runs: compiling the library takes minutes, ninja or make redo what has changed.
LIBRARY_BUILD = ROOT / "build" / f"cpp-test-torch-{torch.__version__}"
LEARNING_RATE = 0.1


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    build = tmp_path_factory.mktemp("consumer")
    run("cmake", "-S", ROOT / "tests/cpp", "-B", build, *generator, torch_root, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    return build / "train"


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_cpp_program_trains_as_python_does(program: Path, tmp_path: Path) -> None:
    module = torch_gated_attn.GatedAttention(8, 2, zero_init=False, q_bias=True)
    q_data, bias, mask = torch.randn(3, 5, 8), torch.randn(2, 5, 5), torch.rand(3, 1, 5) > 0.3
    torch.jit.script(module).save(str(tmp_path / "module.pt"))
    torch.save([q_data, bias, mask], tmp_path / "inputs.pt")
    printed = {}
    for line in run(program, tmp_path / "module.pt", tmp_path / "inputs.pt", str(LEARNING_RATE)).splitlines():
        name, *numbers = line.split()
        printed[name] = torch.tensor([float.fromhex(number) for number in numbers])

    def loss() -> torch.Tensor:
        result: torch.Tensor = module(q_data, mask=mask, bias=bias)
        return result.square().mean()

    before = loss()
    before.backward()
    expected = {"loss": before.detach()} | {name: p.grad for name, p in module.named_parameters()}
    torch.optim.SGD(module.parameters(), LEARNING_RATE).step()
    expected["loss_after"] = loss().detach()
    heads = q_data.unsqueeze(-3)
    expected["function"] = torch_gated_attn.gated_attention(heads, heads, heads, heads)

    assert expected["loss_after"] < expected["loss"]
    assert printed.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None
        assert value.abs().max() > 0, name
        torch.testing.assert_close(printed[name], value.flatten(), rtol=1e-6, atol=1e-8, msg=name)


def test_program_needs_no_python(program: Path) -> None:
    assert "libpython" not in run("ldd", program)
    assert "libtorch_gated_attn.so" in run("ldd", program)
