// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "row_chunks.cuh"

namespace torch_gated_attn::cuda {

// The factor that a gate of logit x is, and one over it. exp2 of a large number is inf and its reciprocal 0, and the
// reciprocal of 1 is 1: exact at both ends. Between them off by some 2^-22, of which a 16-bit result sees nothing.
struct GateFactor {
  float open, inverse;
};
TGA_DEVICE GateFactor gate_factor(float x) {
  const float inverse = 1.0f + dev::exp2(-kLog2e * x);
  return {dev::reciprocal_approx(inverse), inverse};
}

// Gate logits `col` to `col` + 7 of a row; a headwise gate has a column stride of 0.
template <bool kWhole>
TGA_DEVICE Word4 load_gates(const uint16_t* row, int64_t col_stride, int col, int cols, bool pairs_aligned) {
  if (col_stride == 0) {
    const uint32_t pair = dev::load_global<uint16_t>(row) * 0x10001u;
    return {pair, pair, pair, pair};
  }
  return load_chunk<kWhole>(row, col, cols, pairs_aligned);
}

TGA_DEVICE uint32_t load_gate_pair(const uint16_t* row, int64_t col_stride, int col, int cols, bool pairs_aligned) {
  return col_stride == 0 ? dev::load_global<uint16_t>(row) * 0x10001u : load_pair(row, col, cols, pairs_aligned);
}

}  // namespace torch_gated_attn::cuda
