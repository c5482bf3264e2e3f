// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "row_chunks.cuh"

namespace torch_gated_attn::cuda {

// 1 / x as exact as a result of kType shows: of an error of 2^-22 a 16-bit one sees nothing.
template <DType kType>
TGA_DEVICE float reciprocal_for(float x) {
  if constexpr (kType == DType::kFloat32) {
    return dev::reciprocal(x);
  } else {
    return dev::reciprocal_approx(x);
  }
}

// The factor that a gate of logit x is, and one over it. exp2 of a large number is inf and its reciprocal 0, and the
// reciprocal of 1 is 1: exact at both ends.
struct GateFactor {
  float open, inverse;
};
template <DType kType>
TGA_DEVICE GateFactor gate_factor(float x) {
  const float inverse = 1.0f + dev::exp2(-kLog2e * x);
  return {reciprocal_for<kType>(inverse), inverse};
}

// Gate logits `col` to `col` + 7 of a row; a headwise gate has a column stride of 0.
template <DType kType, bool kWhole>
TGA_DEVICE Chunk<kType> load_gates(const ElementOf<kType>* row, int64_t col_stride, int col, int cols, bool pairs_aligned) {
  if (col_stride != 0) {
    return load_chunk<kType, kWhole>(row, col, cols, pairs_aligned);
  }
  uint32_t word;
  if constexpr (kType == DType::kFloat32) {
    word = dev::load_global<uint32_t>(row);
  } else {
    word = dev::load_global<uint16_t>(row) * 0x10001u;
  }
  Chunk<kType> chunk;
  TGA_UNROLL
  for (int i = 0; i < Chunk<kType>::kParts; ++i) {
    chunk.parts[i] = {word, word, word, word};
  }
  return chunk;
}

// Two neighbouring gate logits.
template <DType kType>
TGA_DEVICE Float2 load_gate_pair(const ElementOf<kType>* row, int64_t col_stride, int col, int cols, bool pairs_aligned) {
  if (col_stride == 0) {
    const float g = load_value<kType>(row);
    return {g, g};
  }
  return load_values<kType>(row, col, cols, pairs_aligned);
}

}  // namespace torch_gated_attn::cuda
