// SPDX-License-Identifier: BSD-3-Clause
//
// A copy of a bias whose rows do not begin at pairs, as those of an odd number of keys: the kernels then read it by pairs
// like any other. It is small beside the batch rows that share it.
#pragma once

#include "device.cuh"
#include "params.h"

namespace torch_gated_attn::cuda {

constexpr int kCopyThreads = 128;

// Number of elements that differ along a dimension of `size` and stride `stride`.
TGA_DEVICE int64_t distinct(int64_t stride, int64_t size) { return stride == 0 ? 1 : size; }

// One thread per element of the copy, whose rows are dense but for their padding.
template <class Element>
TGA_KERNEL(kCopyThreads, 1)
copy_bias_kernel(TGA_PARAMS CopyBiasParams p) {
  int64_t index = (p.first_block + dev::block_index()) * kCopyThreads + dev::thread_index();
  const int64_t at = index, rows = distinct(p.from.row, p.q_len), heads = distinct(p.from.head, p.heads);
  const int64_t key = index % p.row_length, row = index / p.row_length % rows;
  index /= p.row_length * rows;
  int64_t offset = row * p.from.row + index % heads * p.from.head;
  index /= heads;
  for (int d = kMaxBatchDims - 1; d >= 0; --d) {
    const int64_t size = distinct(p.from.slab[d], p.slab_sizes[d]);
    offset += index % size * p.from.slab[d];
    index /= size;
  }
  if (index == 0) {
    dev::store_global(
        static_cast<Element*>(p.to) + at,
        key < p.k_len ? dev::load_global<Element>(static_cast<const Element*>(p.from.data) + offset + key) : Element(0));
  }
}

}  // namespace torch_gated_attn::cuda
