// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels for: AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "target.h"

TGA_TARGET_BEGIN("avx2,fma,f16c")
#define TGA_AVX2
namespace torch_gated_attn {
namespace isa_avx2 {
#include "kernels_impl.h"
}  // namespace isa_avx2
TGA_TARGET_END
const CpuKernels kKernelsAvx2 = {"avx2",
                                 isa_avx2::block,
                                 isa_avx2::forward_scratch,
                                 isa_avx2::forward,
                                 isa_avx2::forward_state,
                                 isa_avx2::forward_merge,
                                 isa_avx2::backward_scratch,
                                 isa_avx2::backward,
                                 isa_avx2::backward_merge,
                                 isa_avx2::gate_output,
                                 isa_avx2::gate_output_backward};
}  // namespace torch_gated_attn
#endif
