// SPDX-License-Identifier: BSD-3-Clause
//
// Which kernel runs a call, and why: a pure function of the problem and the architecture, tested without a GPU.
#pragma once

#include <string>

#include "params.h"

namespace torch_gated_attn::cuda {

enum class Kernel { kTensorCore, kPlain, kComposite };

struct Choice {
  Kernel kernel = Kernel::kComposite;
  BiasAccess access = BiasAccess::kNone;
  int head_dim = 0;           // compiled width, >= head_dim and value_dim; 0 for kComposite
  bool share_bias = false;    // several batch rows per block
  bool copy_bias = false;     // its rows are not aligned to pairs: the kernels read an aligned copy
  bool aligned = false;       // 16-byte copies are allowed
  bool grad_aligned = false;  // grad_out can be read by pairs
  std::string reason;         // one sentence for explain() and warnings
};

// For explain(): "tensor-core", "general tensor-core", "plain" or "composite".
const char* name(const Choice& choice);

// Largest head_dim the fused kernels are compiled for.
constexpr int64_t kMaxHeadDim = 128;

// `arch`: 10 * major + minor of the compute capability.
Choice choose_forward(const Problem& problem, int arch);
Choice choose_backward(const Problem& problem, int arch);

}  // namespace torch_gated_attn::cuda
