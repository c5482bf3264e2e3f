// SPDX-License-Identifier: BSD-3-Clause
//
// Takes the place of the CUDA runtime for the kernels' own host code, as nvcc compiles it: a launch is handed, with the
// kernel's name and its parameters, to the interpreter. And the C functions through which the tests run whole calls.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <unordered_map>

#include "run.h"

namespace {

using namespace torch_gated_attn;

// Both are the interpreter's. A launch returns nonzero to end the call.
using Launch = int (*)(const char* kernel, const void* parameters, long blocks, int threads, size_t shared_bytes);
using Allocate = void* (*)(size_t bytes);

std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> names;  // filled before main() by what nvcc writes
  return names;
}

Launch interpret = nullptr;
std::string message;

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[host] = device;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int*) { return cudaErrorNoDevice; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNoDevice; }
const char* cudaGetErrorString(cudaError_t) { return "the interpreter stopped"; }
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!flat || interpret(names().at(kernel).c_str(), arguments[0], grid.x, static_cast<int>(block.x), shared) != 0) {
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// The first error, empty if there is none.
const char* ptx_run(const Problem* problem, int arch, int shared_bytes, bool backward, bool d_gate_is_float, Launch launch,
                    Allocate allocate) {
  cuda::Device device;
  device.arch = arch;
  device.shared_bytes = shared_bytes;
  device.multiprocessors = 4;  // as in the emulator: few, so that chunks have several batch rows
  device.allocate = allocate;
  interpret = launch;
  message.clear();
  try {
    if (backward) {
      cuda::run_backward(*problem, cuda::choose_backward(*problem, arch), device, d_gate_is_float);
    } else {
      cuda::run_forward(*problem, cuda::choose_forward(*problem, arch), device);
    }
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

size_t ptx_problem_bytes() { return sizeof(Problem); }
}
