// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "fragments.cuh"

namespace torch_gated_attn::cuda {

// exp2 of a large number is inf and its reciprocal 0: exact at both ends.
TGA_DEVICE float sigmoid(float x) { return dev::reciprocal(1.0f + dev::exp2(-kLog2e * x)); }

// Two neighbouring gate logits; a headwise gate has a column stride of 0.
template <DType kType>
TGA_DEVICE Float2 load_gate(const ElementOf<kType>* row, int64_t col_stride, int col, int cols, bool pairs_aligned) {
  if (col_stride == 0) {
    const float g = load_value<kType>(row);
    return {g, g};
  }
  return load_values<kType>(row, col, cols, pairs_aligned);
}

}  // namespace torch_gated_attn::cuda
