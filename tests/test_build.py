# SPDX-License-Identifier: BSD-3-Clause
"""What the build promises: one list of sources, one version, no heavy header, and sentences where it cannot go on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from wheel_contents import problems

import torch_gated_attn
from torch_gated_attn import _C

ROOT = Path(__file__).resolve().parents[1]
COMPILED = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]


def listed() -> set[Path]:
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if not line.startswith("#")]
    return {path for _, pattern in lines for path in (ROOT / "csrc").glob(pattern)}


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """The functions of setup.py, run with a setup() that does nothing; `build["said"]` is what it printed."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr("setuptools.setup", lambda **arguments: None)
        patch.setenv("TORCH_GATED_ATTN_CUDA", "0")
        patch.chdir(ROOT)
        functions = runpy.run_path(str(ROOT / "setup.py"))
    return {**functions, "said": said.getvalue()}


def test_every_source_is_listed() -> None:
    assert set(COMPILED) == listed()


def test_cmake_and_setup_read_the_same_lists() -> None:
    for file in ("setup.py", "CMakeLists.txt"):
        text = (ROOT / file).read_text()
        assert "compile_flags.txt" in text
        assert "link_flags.txt" in text
        assert not re.search(r"csrc/\S+\.(cpp|cu)\b", text), f"{file} names a source of its own"


@pytest.mark.parametrize("variant", ["release", "profile", "debug"])
@pytest.mark.parametrize(("compiler", "system"), [("gcc", "linux"), ("clang", "linux"), ("clang", "darwin")])
def test_cmake_and_setup_take_the_same_flags(
    build: dict[str, Any], compiler: str, system: str, variant: str, tmp_path: Path
) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is missing")
    program = tmp_path / "flags.cmake"
    lines = [
        f"set(CMAKE_CURRENT_SOURCE_DIR {ROOT})",
        f"set(CMAKE_CXX_COMPILER_ID {'GNU' if compiler == 'gcc' else 'AppleClang' if system == 'darwin' else 'Clang'})",
        f"set(APPLE {int(system == 'darwin')})",
        f"set(TORCH_GATED_ATTN_BUILD {variant})",
        f"include({ROOT}/cmake/Sources.cmake)",
        "library_flags(compile compile_flags.txt)",
        "library_flags(link link_flags.txt)",
        'message("${compile}|${link}")',
    ]
    program.write_text("\n".join(lines))
    said = subprocess.run([cmake, "-P", str(program)], capture_output=True, text=True, check=True, timeout=60).stderr
    taken = [part.split(";") if part else [] for part in said.strip().split("|")]
    listed = [build["flags"](f"{kind}_flags.txt", compiler, variant, system) for kind in ("compile", "link")]
    assert taken == listed
    assert ("-fopenmp" in listed[0]) == (compiler == "gcc")
    assert ("-g0" in listed[0]) == (variant == "release")
    assert system == "linux" or not any("-z," in flag or flag == "-Wl,-s" for flag in listed[1])


def test_local_version_of_a_wheel(build: dict[str, Any]) -> None:
    assert build["local_version"]("2.14.1+cu130", "13.0") == "+torch2.14.cu130"
    assert build["local_version"]("2.7.1+cu126", None) == "+torch2.7.cpu"


def test_unknown_variant(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_GATED_ATTN_BUILD", "fast")
    with pytest.raises(SystemExit, match="TORCH_GATED_ATTN_BUILD must be release, profile or debug, but is 'fast'"):
        build["variant"]()


def test_versions_agree() -> None:
    assert importlib.metadata.version("torch-gated-attn") == torch_gated_attn.__version__
    assert _C.torch_version == torch.__version__


def test_build_facts() -> None:
    assert _C.cpu_capability() in _C.cpu_capabilities
    assert _C.compiler.split()[0] in ("gcc", "clang")
    assert _C.cuda_version is None or re.fullmatch(r"\d+\.\d+", _C.cuda_version)


def test_library_carries_the_version_the_loader_reports() -> None:
    text = f"torch_gated_attn built with torch {torch.__version__}".encode()
    assert text in Path(_C.__file__).read_bytes()


@pytest.mark.parametrize("header", ["torch/extension.h", "torch/all.h", "torch/torch.h", "ATen/ATen.h"])
def test_no_heavy_header(header: str) -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        assert f"<{header}>" not in path.read_text(), path


def test_no_fast_math() -> None:
    for path in [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]:
        assert not re.search(r"-ffast-math|-Ofast|use_fast_math", path.read_text()), path


def test_kernels_include_no_torch_header() -> None:
    launchers = {"launcher.cpp", "threads.h", "gate_launcher.cpp", "ordered_sum.cpp", "ordered_sum.h"}
    for path in [*(ROOT / "csrc/cpu").glob("*"), *(ROOT / "csrc/cuda").rglob("*.cu*"), ROOT / "csrc/problem.h"]:
        if path.name not in launchers:
            assert not re.search(r'#include [<"](torch|ATen|c10)/', path.read_text()), path


def test_core_needs_no_python_symbol() -> None:
    """Only python/ may: the core is also a C++ library."""
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.parent.name != "python":
            assert not re.search(r"<(Python\.h|pybind11/)|torch/csrc/(utils|Exceptions)", path.read_text()), path


def test_without_torch_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "torch_gated_attn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def setup_py(command: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "setup.py", "--quiet", command]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    refused = setup_py("build_ext")
    assert refused.returncode != 0
    sentence = refused.stderr.strip().splitlines()[-1]
    assert "install torch>=2.11 first, then run `pip install --no-build-isolation .`" in sentence
    assert "Traceback" not in refused.stderr
    metadata = setup_py("egg_info")
    assert metadata.returncode == 0, metadata.stderr


def copied(folder: Path) -> Path:
    """The checkout without what was built."""
    return Path(
        shutil.copytree(
            ROOT,
            folder / "tree",
            ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "*.so", "__pycache__", ".*_cache"),
        )
    )


def test_source_distribution_is_complete_and_needs_no_network(tmp_path: Path) -> None:
    tree = copied(tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    no_network = {**os.environ, "TORCH_GATED_ATTN_CUDA": "0", "https_proxy": "http://127.0.0.1:9", "PIP_NO_INDEX": "1"}
    subprocess.run(command, cwd=tree, env=no_network, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("csrc", "tests", "torch_gated_attn", "cmake"):
        wanted = {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
        assert wanted <= names, sorted(wanted - names)
    top = {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "CMakeLists.txt",
        "mkdocs.yml",
        "CITATION.cff",
        "SECURITY.md",
    }
    assert top <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_what_a_wheel_must_not_hold_is_noticed(tmp_path: Path) -> None:
    wheel = tmp_path / "torch_gated_attn-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("torch_gated_attn/_C.so", "torch_gated_attn/lib/libtorch_cpu.so", "tests/test_build.py"):
            archive.writestr(name, "")
    said = "\n".join(problems(wheel))
    for text in (
        "libtorch_cpu.so is a library of",
        "tests/test_build.py does not belong",
        "py.typed is missing",
        "licence",
    ):
        assert text in said
    assert "tests is installed beside the package" in said
    assert "must be tagged with the Python" in said
    assert "must have one library" in said


def test_versions_of_the_citation_and_the_package_agree() -> None:
    version = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert version.group(1) == torch_gated_attn.__version__


def test_wheel_works_away_from_the_sources(tmp_path: Path) -> None:
    """Built from the object files of this checkout; what is installed is what it says, and needs nothing else of it."""
    cuda = "0" if _C.cuda_version is None else "1"
    no_network = {**os.environ, "TORCH_GATED_ATTN_CUDA": cuda, "PIP_NO_INDEX": "1"}
    no_network.pop("PYTHONPATH", None)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(wheel, env=no_network, check=True, capture_output=True, timeout=3000)
    (built,) = tmp_path.glob("*.whl")
    assert "linux" in built.name or not sys.platform.startswith("linux")
    assert not problems(built, "cuda" if _C.cuda_version else "cpu")
    installed = tmp_path / "installed"
    install = [*pip, "install", "--no-deps", "--target", str(installed), str(built)]
    subprocess.run(install, env=no_network, check=True, capture_output=True, timeout=600)
    program = "import torch_gated_attn as t; print(t.__version__, t.__file__)"
    # This interpreter, for its torch; what PYTHONPATH names comes before an editable install of the checkout.
    environment = {**no_network, "PYTHONPATH": str(installed)}

    def run(*arguments: str) -> str:
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "timeout": 600}
        return subprocess.run([sys.executable, *arguments], text=True, check=True, **options).stdout

    expected = [torch_gated_attn.__version__, str(installed / "torch_gated_attn/__init__.py")]
    assert run("-c", program).split() == expected
    assert run("-m", "torch_gated_attn.cli.selftest", "cpu").count('"ok"') == 4


@pytest.mark.parametrize(
    ("wish", "torch_cuda", "toolkit", "on", "why"),
    [
        ("", None, None, False, "this torch is a build without CUDA"),
        ("", "13.0", None, False, "nvcc was not found (set CUDA_HOME)"),
        ("", "13.0", ("/cuda", "12.4"), False, "nvcc is 12.4, but torch was built with CUDA 13.0"),
        ("", "13.0", ("/cuda", "13.2"), True, "nvcc 13.2 in /cuda, torch built with CUDA 13.0"),
        ("0", "13.0", ("/cuda", "13.0"), False, "TORCH_GATED_ATTN_CUDA=0"),
        ("1", "13.0", None, None, "TORCH_GATED_ATTN_CUDA=1, but nvcc was not found (set CUDA_HOME)"),
        ("yes", "13.0", None, None, "TORCH_GATED_ATTN_CUDA must be 0 or 1, but is 'yes'"),
    ],
)
def test_choice_of_cuda(
    build: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    wish: str,
    torch_cuda: str | None,
    toolkit: tuple[str, str] | None,
    on: bool | None,
    why: str,
) -> None:
    choose = build["choose_cuda"]
    monkeypatch.setitem(choose.__globals__, "sources", lambda *parts: ["kernel.cu"])
    monkeypatch.setenv("TORCH_GATED_ATTN_CUDA", wish)
    if on is None:
        with pytest.raises(SystemExit, match=re.escape(why)):
            choose(torch_cuda, toolkit)
    else:
        assert choose(torch_cuda, toolkit) == (on, why)


def test_build_says_whether_it_has_cuda(build: dict[str, Any]) -> None:
    assert "torch_gated_attn: CUDA kernels off: TORCH_GATED_ATTN_CUDA=0" in build["said"].splitlines()
