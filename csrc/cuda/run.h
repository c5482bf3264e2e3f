// SPDX-License-Identifier: BSD-3-Clause
//
// A whole forward or backward on a device, torch-free: the launcher gives it a stream and memory, the host emulator
// neither.
#pragma once

#include <cstddef>
#include <functional>

#include "select.h"

namespace torch_gated_attn::cuda {

struct Device {
  int arch = 0;          // 10 * major + minor
  int shared_bytes = 0;  // what a block may ask for
  int multiprocessors = 0;
  void* stream = nullptr;
  std::function<void*(size_t)> allocate;  // scratch that lives until the stream has run past the call, 256-byte aligned
};

// For choices other than kComposite. Everything is enqueued on device.stream; nothing waits for it.
void run_forward(const Problem& problem, const Choice& choice, const Device& device);
// Gradients whose View has no data are not computed. `d_gate_is_float`: problem.d_gate is float32 whatever the dtype, for a
// caller that sums it over broadcast dimensions.
void run_backward(const Problem& problem, const Choice& choice, const Device& device, bool d_gate_is_float);

}  // namespace torch_gated_attn::cuda
