// SPDX-License-Identifier: BSD-3-Clause
//
// The instruction set of this process: the best the machine has, or a lower one that the environment variable
// TORCH_GATED_ATTN_CPU_CAPABILITY names (default, avx2, avx512, avx512_bf16; on aarch64 default, neon).
#pragma once

#include <vector>

#include "kernels.h"

namespace torch_gated_attn {

const CpuKernels& cpu_kernels();              // std::runtime_error for an unknown name
const char* cpu_capability();                 // its name
std::vector<const char*> cpu_capabilities();  // the names of all that were compiled, from the lowest to the highest

// For explain(): which of an instruction set's kernels takes the call, and why.
struct CpuChoice {
  const char *kernel, *reason;
};
CpuChoice choose_cpu(const Problem& problem);

}  // namespace torch_gated_attn
