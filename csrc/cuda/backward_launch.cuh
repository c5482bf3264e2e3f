// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "backward_bias.cuh"
#include "backward_key.cuh"
#include "backward_query.cuh"
#include "dispatch.h"
#include "kernels.h"
#include "prepare.cuh"

namespace torch_gated_attn::cuda {

template <class T>
void launch_query_tile(const BackwardParams& p, void* stream) {
  const int64_t query_tiles = (p.q_len + T::kRows - 1) / T::kRows;
  dev::launch(backward_query_kernel<T>, p, query_tiles * p.chunks * p.heads * p.batch.slabs, T::kBlockThreads,
              static_cast<size_t>(QueryBlock<T>::shared_bytes(p.k_len)), stream, "the backward kernel for query and bias");
}

template <class T>
void launch_key_tile(const BackwardParams& p, void* stream) {
  const int64_t key_tiles = (p.k_len + T::kRows - 1) / T::kRows, groups = (p.batch.rows + T::kTeams - 1) / T::kTeams;
  dev::launch(backward_key_kernel<T>, p, key_tiles * groups * p.kv_heads * p.batch.slabs, T::kBlockThreads,
              KeyBlock<T>::kSharedBytes, stream, "the backward kernel for key and value");
}

template <class T>
void launch_bias_tile(const BackwardParams& p, void* stream) {
  const int64_t query_tiles = (p.q_len + T::kRows - 1) / T::kRows, key_tiles = (p.k_len + T::kBlock - 1) / T::kBlock;
  dev::launch(backward_bias_kernel<T>, p, key_tiles * query_tiles * p.chunks * p.heads * p.batch.slabs, T::kThreads,
              BiasBlock<T>::kSharedBytes, stream, "the backward kernel for the bias");
}

// Calls f with the tile of backward_query.cuh; dBias of a general call never goes through a strip, and there is none
// without a bias.
template <DType kType, int kHeadDim, class F>
auto with_query_tile(BiasAccess access, bool strip, F f) {
  return with_access<kType>(access, [&](auto a) {
    if constexpr (a.value == BiasAccess::kHalf || a.value == BiasAccess::kFloat) {
      return strip ? f(QueryTile<kType, kHeadDim, a.value, true>()) : f(QueryTile<kType, kHeadDim, a.value, false>());
    } else {
      return f(QueryTile<kType, kHeadDim, a.value, false>());
    }
  });
}

template <DType kType, int kHeadDim>
bool strip_fits(int k_len, BiasAccess access, int shared_bytes) {
  if (access != BiasAccess::kHalf && access != BiasAccess::kFloat) {
    return false;
  }
  return with_query_tile<kType, kHeadDim>(access, true, [&](auto tile) {
    using Block = QueryBlock<decltype(tile)>;
    return k_len <= Block::kLongestStrip && Block::shared_bytes(k_len) <= shared_bytes;
  });
}

template <DType kType, int kHeadDim>
int query_rows_at_once(BiasAccess access, bool strip) {
  return with_query_tile<kType, kHeadDim>(access, strip,
                                          [](auto tile) { return decltype(tile)::kTeams * decltype(tile)::kGroup; });
}

template <DType kType, int kHeadDim>
void launch_backward_query(const BackwardParams& p, BiasAccess access, bool strip, void* stream) {
  with_query_tile<kType, kHeadDim>(access, strip, [&](auto tile) { launch_query_tile<decltype(tile)>(p, stream); });
}

template <DType kType, int kHeadDim>
void launch_backward_key(const BackwardParams& p, BiasAccess access, void* stream) {
  with_access<kType>(access, [&](auto a) { launch_key_tile<KeyTile<kType, kHeadDim, a.value>>(p, stream); });
}

template <DType kType, int kHeadDim>
void launch_backward_bias(const BackwardParams& p, BiasAccess access, void* stream) {
  with_access<kType>(access, [&](auto a) {
    if constexpr (a.value != BiasAccess::kNone) {
      launch_bias_tile<BiasTile<kType, kHeadDim, a.value>>(p, stream);
    }
  });
}

template <DType kType, int kHeadDim>
void launch_prepare_rows(const BackwardParams& p, void* stream) {
  constexpr int kRows = PrepareShape<kHeadDim>::kRowsPerBlock;
  const int64_t rows = p.batch.slabs * p.batch.rows * p.heads * p.q_padded;
  dev::launch(prepare_rows_kernel<kType, kHeadDim>, p, (rows + kRows - 1) / kRows, kPrepareThreads, 0, stream,
              "the backward kernel for the rows");
}

}  // namespace torch_gated_attn::cuda
