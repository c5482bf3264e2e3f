// SPDX-License-Identifier: BSD-3-Clause
//
// The bias where the kernels can read it by pairs.
#pragma once

#include "kernels.h"
#include "run.h"

namespace torch_gated_attn::cuda {

// Enqueues the copy of the bias into scratch memory; returns the copy.
inline Operand copy_bias(const AttentionParams& p, const Device& device) {
  CopyBiasParams copy;
  copy.from = p.bias;
  copy.heads = p.heads, copy.q_len = p.q_len, copy.k_len = p.k_len;
  copy.row_length = (static_cast<int64_t>(p.k_len) + 1) / 2 * 2;
  Operand to;
  int64_t elements = copy.row_length;
  // The stride of a dimension in the copy, which is dense; 0 where the bias is broadcast.
  const auto place = [&elements](int64_t stride, int64_t size) {
    const int64_t dense = stride == 0 ? 0 : elements;
    elements *= stride == 0 ? 1 : size;
    return dense;
  };
  to.row = place(p.bias.row, p.q_len);
  to.head = place(p.bias.head, p.heads);
  for (int d = kMaxBatchDims - 1; d >= 0; --d) {
    copy.slab_sizes[d] = p.batch.slab_sizes[d];
    to.slab[d] = place(p.bias.slab[d], p.batch.slab_sizes[d]);
  }
  to.col = 1;
  to.data = copy.to = device.allocate(elements * (p.bias_is_float ? 4 : 2));
  launch_copy_bias(copy, elements, p.bias_is_float, device.stream);
  return to;
}

}  // namespace torch_gated_attn::cuda
