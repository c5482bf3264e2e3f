// SPDX-License-Identifier: BSD-3-Clause
//
// What a launcher gives to a run: scratch memory and the facts of a device.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "device.cuh"
#include "run.h"

namespace emulator {

// Scratch ends at an odd place and begins with garbage, like recycled device memory.
class Scratch {
 public:
  void* allocate(size_t bytes) {
    buffers_.push_back(std::make_unique<char[]>(bytes + 256));
    char* start = buffers_.back().get();
    std::memset(start, 0xff, bytes + 256);
    start += 256 - reinterpret_cast<uintptr_t>(start) % 256;
    emulator::global_memory.allow(start, bytes, true);
    total += bytes;
    return start;
  }
  size_t total = 0;

 private:
  std::vector<std::unique_ptr<char[]>> buffers_;
};

// Shared memory of a block; 0: that of the architecture.
inline int shared_bytes_limit = 0;

inline torch_gated_attn::cuda::Device emulated_device(int arch, Scratch& scratch) {
  torch_gated_attn::cuda::Device device;
  device.arch = arch;
  device.shared_bytes = arch == 80 ? 163 * 1024 : arch == 90 ? 227 * 1024 : 99 * 1024;
  if (shared_bytes_limit != 0) {
    device.shared_bytes = shared_bytes_limit;
  }
  device.multiprocessors = 4;
  device.allocate = [&scratch](size_t bytes) { return scratch.allocate(bytes); };
  return device;
}

}  // namespace emulator
