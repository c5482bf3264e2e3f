// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels for: NEON, which every aarch64 processor has.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define TGA_NEON
namespace torch_gated_attn {
namespace isa_neon {
#include "kernels_impl.h"
}  // namespace isa_neon
const CpuKernels kKernelsNeon = {"neon",
                                 isa_neon::block,
                                 isa_neon::forward_scratch,
                                 isa_neon::forward,
                                 isa_neon::forward_state,
                                 isa_neon::forward_merge,
                                 isa_neon::backward_scratch,
                                 isa_neon::backward,
                                 isa_neon::backward_merge,
                                 isa_neon::gate_output,
                                 isa_neon::gate_output_backward};
}  // namespace torch_gated_attn
#endif
