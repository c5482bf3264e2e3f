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

// Sharing the bias pays if the last group of batch rows is not mostly empty.
template <class Shared, class Single>
void launch_forward_biased(const AttentionParams& p, bool share_bias, void* stream) {
  constexpr int kGroup = Shared::kGroup;
  const int64_t padded = (p.batch.rows + kGroup - 1) / kGroup * kGroup;
  if (share_bias && padded * 3 <= p.batch.rows * 4) {
    launch_forward_tile<Shared>(p, stream);
  } else {
    launch_forward_tile<Single>(p, stream);
  }
}

template <DType kType, int kHeadDim>
void launch_forward(const AttentionParams& p, BiasAccess access, bool share_bias, void* stream) {
  switch (access) {
    case BiasAccess::kNone: return launch_forward_tile<ForwardTile<kType, kHeadDim, BiasAccess::kNone, false>>(p, stream);
    case BiasAccess::kHalf:
      return launch_forward_biased<ForwardTile<kType, kHeadDim, BiasAccess::kHalf, true>,
                                   ForwardTile<kType, kHeadDim, BiasAccess::kHalf, false>>(p, share_bias, stream);
    case BiasAccess::kFloat:
      return launch_forward_biased<ForwardTile<kType, kHeadDim, BiasAccess::kFloat, true>,
                                   ForwardTile<kType, kHeadDim, BiasAccess::kFloat, false>>(p, share_bias, stream);
    case BiasAccess::kGeneral:
      return launch_forward_tile<ForwardTile<kType, kHeadDim, BiasAccess::kGeneral, false>>(p, stream);
  }
}

}  // namespace torch_gated_attn::cuda
