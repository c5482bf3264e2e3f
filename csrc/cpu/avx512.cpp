// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels for: AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "target.h"

#if !defined(__clang__)  // immintrin.h of GCC 12 builds unused operands from an uninitialised variable
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
TGA_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define TGA_AVX512
namespace torch_gated_attn {
namespace isa_avx512 {
#include "kernels_impl.h"
}  // namespace isa_avx512
TGA_TARGET_END
const CpuKernels kKernelsAvx512 = {"avx512",
                                   isa_avx512::block,
                                   isa_avx512::forward_scratch,
                                   isa_avx512::forward,
                                   isa_avx512::forward_state,
                                   isa_avx512::forward_merge,
                                   isa_avx512::backward_scratch,
                                   isa_avx512::backward,
                                   isa_avx512::backward_merge,
                                   isa_avx512::gate_output,
                                   isa_avx512::gate_output_backward};
}  // namespace torch_gated_attn
#endif
