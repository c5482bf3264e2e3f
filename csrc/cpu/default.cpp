// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels for: portable.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace torch_gated_attn {
namespace isa_default {
#include "kernels_impl.h"
}  // namespace isa_default
const CpuKernels kKernelsDefault = {"default",
                                    isa_default::block,
                                    isa_default::forward_scratch,
                                    isa_default::forward,
                                    isa_default::forward_state,
                                    isa_default::forward_merge,
                                    isa_default::backward_scratch,
                                    isa_default::backward,
                                    isa_default::backward_merge,
                                    isa_default::gate_output,
                                    isa_default::gate_output_backward};
}  // namespace torch_gated_attn
