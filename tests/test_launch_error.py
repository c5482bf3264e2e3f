# SPDX-License-Identifier: BSD-3-Clause
"""What a launch that fails is reported as: the project's check, compiled against a CUDA runtime that fails on purpose."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

CUDA = pathlib.Path(__file__).resolve().parents[1] / "csrc" / "cuda"
RUNTIME = """
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 12, cudaDevAttrComputeCapabilityMinor = 1 };
inline cudaError_t last_error = cudaErrorUnknown;
inline cudaError_t cudaGetLastError() { cudaError_t last = last_error; last_error = cudaSuccess; return last; }
inline cudaError_t cudaGetDevice(int* device) { *device = 3; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  *value = device == 3 ? which : 0;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "unspecified launch failure"; }
"""
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "launch_error.h"
int main(int, char** arguments) {
  try {
    torch_gated_attn::cuda::dev::check(static_cast<cudaError_t>(std::atoi(arguments[1])), "the forward kernel");
    std::puts("nothing");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return last_error == cudaSuccess ? 0 : 1;
  }
}
"""
NO_KERNELS = (
    "query is on a GPU of compute capability 12.1, for which this build of torch_gated_attn has no kernels: "
    "rebuild it with TORCH_CUDA_ARCH_LIST=12.1"
)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_one_sentence_that_is_reported_once(tmp_path):
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    program = tmp_path / "program"
    command = ["g++", "-std=c++20", f"-I{tmp_path}", f"-I{CUDA}", str(tmp_path / "main.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    failed = "torch_gated_attn: the forward kernel failed on the GPU: unspecified launch failure"
    for status, said in enumerate(("nothing", NO_KERNELS, NO_KERNELS, failed)):
        run = subprocess.run([program, str(status)], capture_output=True, text=True)
        assert (run.stdout.strip(), run.returncode) == (said, 0), status
