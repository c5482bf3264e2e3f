# SPDX-License-Identifier: BSD-3-Clause
"""Builds the extension module torch_gated_attn._C: the operator library and a few facts about its build.

Environment: CXX is the compiler, GCC or clang; TORCH_GATED_ATTN_CUDA=0/1 forces the CUDA kernels off or on,
TORCH_CUDA_ARCH_LIST picks their architectures (default: those of the devices of this machine, or 8.0 and all newer),
CUDA_HOME the toolkit, MAX_JOBS the number of compilers at a time, TORCH_GATED_ATTN_BUILD=release/profile/debug the variant,
TORCH_GATED_ATTN_LOCAL_VERSION=1 adds PyTorch and CUDA to the version, for a wheel that others install.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

NO_TORCH = (
    "torch_gated_attn is compiled against the PyTorch that will run it, but this Python cannot import torch ({error}): "
    "install torch>=2.11 first, then run `pip install --no-build-isolation .`"
)


def lines(name: str) -> list[str]:
    return [line for line in (ROOT / "csrc" / name).read_text().splitlines() if line and not line.startswith("#")]


def compiler() -> str:
    """gcc or clang, as CXX or the c++ on the PATH says it; `c++` may be either, and so may `g++` on macOS."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:  # torch's own check of the compiler says what is missing
        return "gcc"
    return "clang" if "clang" in said else "gcc"


def variant() -> str:
    wish = os.environ.get("TORCH_GATED_ATTN_BUILD", "release")
    if wish not in ("release", "profile", "debug"):
        raise SystemExit(f"TORCH_GATED_ATTN_BUILD must be release, profile or debug, but is {wish!r}")
    return wish


def flags(name: str, compiler: str, variant: str, system: str = sys.platform) -> list[str]:
    """What csrc/<name> lists for this build."""
    true = {"always", compiler, variant, *(() if system == "darwin" else ("elf",))}
    columns = [line.split() for line in lines(name)]
    return [flag for conditions, flag in columns if true.issuperset(conditions.split(","))]


def sources(*parts: str) -> list[str]:
    """The files that csrc/sources.txt lists for these parts of the library, relative to the repository's root."""
    found: list[str] = []
    for line in lines("sources.txt"):
        part, pattern = line.split()
        if part in parts:
            found += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))
    return found


def cuda_toolkit() -> tuple[str, str] | None:
    """Home and version of the toolkit of CUDA_HOME, or else of the nvcc on the PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not os.path.exists(nvcc):
        return None
    # The nvcc on the PATH may be a script that calls the real one, which knows where it is.
    run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    here = re.search(r"_HERE_=(.+)", run.stderr)
    version = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if here is None or version is None:
        return None
    return home or os.path.dirname(here.group(1).strip()), version.group(1)


def choose_cuda(torch_cuda: str | None, toolkit: tuple[str, str] | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why."""
    wish = os.environ.get("TORCH_GATED_ATTN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"TORCH_GATED_ATTN_CUDA must be 0 or 1, but is {wish!r}")
    if wish == "0":
        return False, "TORCH_GATED_ATTN_CUDA=0"
    missing = None
    if not sources("cuda"):
        missing = "this source tree has no CUDA kernels"
    elif torch_cuda is None:
        missing = "this torch is a build without CUDA"
    elif toolkit is None:
        missing = "nvcc was not found (set CUDA_HOME)"
    elif toolkit[1].split(".")[0] != torch_cuda.split(".")[0]:
        missing = f"nvcc is {toolkit[1]}, but torch was built with CUDA {torch_cuda}"
    if missing is None:
        assert toolkit is not None
        return True, f"nvcc {toolkit[1]} in {toolkit[0]}, torch built with CUDA {torch_cuda}"
    if wish == "1":
        raise SystemExit(f"TORCH_GATED_ATTN_CUDA=1, but {missing}")
    return False, missing


def local_version(torch_version: str, cuda: str | None) -> str:
    """+torch2.14.cu130: what a wheel runs beside; its CUDA is that of its kernels, `cpu` where it has none."""
    minor = ".".join(torch_version.split(".")[:2])
    return f"+torch{minor}.{'cu' + cuda.replace('.', '') if cuda else 'cpu'}"


def extension() -> tuple[Extension, type[build_ext], str]:
    import torch

    toolkit = cuda_toolkit()
    with_cuda, why = choose_cuda(torch.version.cuda, toolkit)
    print(f"torch_gated_attn: CUDA kernels {'on' if with_cuda else 'off'}: {why}", file=sys.stderr)
    build = compiler(), variant()
    cxx, nvcc = flags("compile_flags.txt", *build), ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]
    cxx.append(f'-DTORCH_GATED_ATTN_TORCH_VERSION="{torch.__version__}"')
    if with_cuda:
        assert toolkit is not None
        os.environ["CUDA_HOME"] = toolkit[0]  # read by torch when cpp_extension is imported
        # Otherwise torch takes the architectures of the devices here; 8.0 is the first with the instructions we use.
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # newer devices compile the PTX at first use
        cxx.append(f'-DTORCH_GATED_ATTN_WITH_CUDA="{toolkit[1]}"')

    from torch.utils import cpp_extension

    device = "cuda" if with_cuda else "cpu"
    # As system headers: their warnings are not ours.
    cxx += [f"-isystem{path}" for path in cpp_extension.include_paths(device)]
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    parts = ("core", "python", "cuda") if with_cuda else ("core", "python")
    built = kind(
        "torch_gated_attn._C",
        sources(*parts),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=flags("link_flags.txt", *build),
    )
    kept = "-".join([f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}", device, *build])

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = kept  # an editable install would compile everything anew in a temporary folder

    return built, Build, local_version(torch.__version__, torch.version.cuda if with_cuda else None)


def without_torch(error: ImportError) -> tuple[Extension, type[build_ext], str]:
    """Lets commands that compile nothing (sdist, metadata) pass; a build ends in one sentence."""

    class Refuse(build_ext):
        def run(self) -> None:
            raise SystemExit(NO_TORCH.format(error=error))

    return Extension("torch_gated_attn._C", sources("core", "python")), Refuse, ""


os.chdir(ROOT)
try:
    module, command, local = extension()
except ImportError as import_error:
    module, command, local = without_torch(import_error)
tagged = local if os.environ.get("TORCH_GATED_ATTN_LOCAL_VERSION") == "1" else ""
setup(ext_modules=[module], cmdclass={"build_ext": command}, options={"egg_info": {"tag_build": tagged}})
