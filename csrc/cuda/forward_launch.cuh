// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "dispatch.h"
#include "forward.cuh"
#include "kernels.h"

namespace torch_gated_attn::cuda {

template <class T>
void launch_forward_tile(const AttentionParams& p, void* stream) {
  const int64_t query_tiles = (p.q_len + T::kRows - 1) / T::kRows, groups = (p.batch.rows + T::kGroup - 1) / T::kGroup;
  dev::launch(forward_kernel<T>, p, query_tiles * groups * p.heads * p.batch.slabs, T::kThreads,
              ForwardBlock<T>::kSharedBytes, stream, "the forward kernel");
}

template <DType kType, int kHeadDim>
void launch_forward(const AttentionParams& p, BiasAccess access, bool share_bias, void* stream) {
  with_access<kType>(access, [&](auto a) {
    // In float32 tensor cores are the limit, not the bias: sharing it would save nothing.
    if constexpr (kType != DType::kFloat32 && (a.value == BiasAccess::kHalf || a.value == BiasAccess::kFloat)) {
      if (share_bias) {
        return launch_forward_tile<ForwardTile<kType, kHeadDim, a.value, true>>(p, stream);
      }
    }
    launch_forward_tile<ForwardTile<kType, kHeadDim, a.value, false>>(p, stream);
  });
}

}  // namespace torch_gated_attn::cuda
