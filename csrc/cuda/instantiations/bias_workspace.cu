// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels around the bias that do not depend on head_dim.
#include "../backward_bias.cuh"
#include "../copy_bias.cuh"
#include "../kernels.h"
#include "../prepare.cuh"

namespace torch_gated_attn::cuda {

template <DType kType>
void launch_transpose_bias(const BackwardParams& p, void* stream) {
  const int64_t bias_heads = p.bias.head == 0 ? 1 : p.heads;
  const int64_t elements = p.batch.slabs / p.batch.slabs_per_outer * bias_heads * p.q_padded * p.k_padded;
  const int64_t threads = elements / (p.bias_is_float ? 4 : 8);
  dev::launch(p.bias_is_float ? transpose_bias_kernel<kType, true> : transpose_bias_kernel<kType, false>, p,
              (threads + kPrepareThreads - 1) / kPrepareThreads, kPrepareThreads, 0, stream,
              "the kernel that reorders the bias");
}

template <DType kType>
void launch_reduce_bias(const BackwardParams& p, void* stream) {
  const int64_t heads = p.d_bias.head == 0 ? 1 : p.heads, queries = p.d_bias.row == 0 ? 1 : p.q_len,
                keys = p.d_bias.col == 0 ? 1 : p.k_len;
  const int64_t elements = p.batch.slabs / p.batch.slabs_per_outer * heads * queries * keys;
  dev::launch(reduce_bias_kernel<kType>, p, (elements + 127) / 128, 128, 0, stream,
              "the kernel that sums the bias gradient");
}

void launch_copy_bias(const CopyBiasParams& p, int64_t elements, bool is_float, void* stream) {
  dev::launch(is_float ? copy_bias_kernel<float> : copy_bias_kernel<uint16_t>, p,
              (elements + kCopyThreads - 1) / kCopyThreads, kCopyThreads, 0, stream, "the kernel that copies the bias");
}

template void launch_transpose_bias<DType::kBFloat16>(const BackwardParams&, void*);
template void launch_transpose_bias<DType::kFloat16>(const BackwardParams&, void*);
template void launch_reduce_bias<DType::kBFloat16>(const BackwardParams&, void*);
template void launch_reduce_bias<DType::kFloat16>(const BackwardParams&, void*);
template void launch_reduce_bias<DType::kFloat32>(const BackwardParams&, void*);

}  // namespace torch_gated_attn::cuda
