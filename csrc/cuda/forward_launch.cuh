// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "forward.cuh"
#include "kernels.h"

namespace torch_gated_attn::cuda {

template <class T>
void launch_forward_tile(const AttentionParams& p, void* stream) {
  const int64_t query_tiles = (p.q_len + T::kRows - 1) / T::kRows, groups = (p.batch.rows + T::kGroup - 1) / T::kGroup;
  dev::launch(forward_kernel<T>, p, query_tiles * groups * p.heads * p.batch.slabs, T::kThreads,
              ForwardBlock<T>::kSharedBytes, stream, "the forward kernel");
}

template <DType kType, int kHeadDim, BiasAccess kBias>
void launch_forward_biased(const AttentionParams& p, bool share_bias, void* stream) {
  if (share_bias) {
    launch_forward_tile<ForwardTile<kType, kHeadDim, kBias, true>>(p, stream);
  } else {
    launch_forward_tile<ForwardTile<kType, kHeadDim, kBias, false>>(p, stream);
  }
}

template <DType kType, int kHeadDim>
void launch_forward(const AttentionParams& p, BiasAccess access, bool share_bias, void* stream) {
  switch (access) {
    case BiasAccess::kNone: return launch_forward_tile<ForwardTile<kType, kHeadDim, BiasAccess::kNone, false>>(p, stream);
    case BiasAccess::kHalf: return launch_forward_biased<kType, kHeadDim, BiasAccess::kHalf>(p, share_bias, stream);
    case BiasAccess::kFloat: return launch_forward_biased<kType, kHeadDim, BiasAccess::kFloat>(p, share_bias, stream);
    case BiasAccess::kGeneral:
      return launch_forward_tile<ForwardTile<kType, kHeadDim, BiasAccess::kGeneral, false>>(p, stream);
  }
}

}  // namespace torch_gated_attn::cuda
