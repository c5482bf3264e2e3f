// SPDX-License-Identifier: BSD-3-Clause
//
// What a failed call of the CUDA runtime is reported as. No device code, so that a test compiles it against a runtime of
// its own.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace torch_gated_attn::cuda::dev {

[[noreturn]] inline void throw_launch_error(cudaError_t status, const char* what) {
  // The runtime keeps it for whoever asks next, who would report it a second time.
  cudaGetLastError();
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string arch = std::to_string(major) + "." + std::to_string(minor);
    throw std::runtime_error("query is on a GPU of compute capability " + arch +
                             ", for which this build of torch_gated_attn has no kernels: rebuild it with "
                             "TORCH_CUDA_ARCH_LIST=" +
                             arch);
  }
  throw std::runtime_error(std::string("torch_gated_attn: ") + what + " failed on the GPU: " + cudaGetErrorString(status));
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw_launch_error(status, what);
}

}  // namespace torch_gated_attn::cuda::dev
