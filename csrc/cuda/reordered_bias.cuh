// SPDX-License-Identifier: BSD-3-Clause
//
// Reading the bias that transpose_bias_kernel reordered: 16 keys x 16 queries (halves) or 16 x 8 (floats) to a fragment of
// the transposed scores, a thread's share contiguous.
#pragma once

#include "fragments.cuh"

namespace torch_gated_attn::cuda {

// C operand of half e of a 16x16 tile, from its bias in 16 bits: words 0 and 1 hold its left 16x8 half, 2 and 3 the right
// one. The same multiplication as that of BiasRows, which the forward uses.
template <DType kType>
TGA_DEVICE void scale_bias(float (&c)[4], const uint32_t (&words)[4], int e, float inverse_scale) {
  TGA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Float2 pair = dev::unpack<kType>(words[2 * e + i]);
    c[2 * i] = dev::multiply_toward_zero(pair.x, inverse_scale);
    c[2 * i + 1] = dev::multiply_toward_zero(pair.y, inverse_scale);
  }
}

// Walks the bias of one head along the queries, for the key tiles of one warp: C operands of the transposed scores.
template <class T>
class BiasAlongQueries {
 public:
  TGA_DEVICE BiasAlongQueries(const BackwardParams& p, int64_t entry, int first_key, int first_query)
      : inverse_scale_(1.0f / fabsf(p.scale)), next_tile_(p.bias_of_keys ? 0 : T::kBlock * 16 * kElementBytes) {
    const int first = p.bias_of_keys ? 0 : first_query;
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      data_[m] = static_cast<const char*>(p.bias_t) +
                 ((entry * (p.k_padded / 16) + first_key / 16 + m) * p.bias_queries + first) * (16 * kElementBytes) +
                 this_lane().index * 16;
    }
  }
  // The 16 queries that begin at `query` of the tile, for key tile m: c[0] the first 8, c[1] the others.
  TGA_DEVICE void load(float (&c)[2][4], int query, int m) const {
    const char* at = data_[m] + query * (16 * kElementBytes);
    if constexpr (T::kBias == BiasAccess::kFloat) {
      TGA_UNROLL
      for (int e = 0; e < 2; ++e) {
        const Float4 v = dev::load_global<Float4>(at + e * 512);
        c[e][0] = v.x;
        c[e][1] = v.y;
        c[e][2] = v.z;
        c[e][3] = v.w;
      }
    } else {
      const Word4 v = dev::load_global<Word4>(at);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      scale_bias<T::kType>(c[0], words, 0, inverse_scale_);
      scale_bias<T::kType>(c[1], words, 1, inverse_scale_);
    }
  }
  TGA_DEVICE void next_tile() {
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      data_[m] += next_tile_;
    }
  }

 private:
  static constexpr int kElementBytes = T::kBias == BiasAccess::kFloat ? 4 : 2;
  float inverse_scale_;
  int next_tile_;
  const char* data_[T::kRowTiles];
};

// The same bias, of 16-bit type, for the query tiles of one warp: C operands of the scores themselves.
template <class T>
class BiasAlongKeys {
 public:
  TGA_DEVICE BiasAlongKeys(const BackwardParams& p, int64_t entry, int first_query)
      : inverse_scale_(1.0f / fabsf(p.scale)),
        key_tile_bytes_(p.bias_queries * 32),
        data_(static_cast<const char*>(p.bias_t) + entry * p.k_padded * p.bias_queries * 2 +
              (p.bias_of_keys ? 0 : first_query * 32) + this_lane().index * 16) {}

  TGA_DEVICE void begin_tile(int key) { tile_ = data_ + dev::multiply_wide(key / 16, key_tile_bytes_); }

  // The j-th 16 keys of the tile, for operand().
  TGA_DEVICE void load(uint32_t (&words)[T::kRowTiles][4], int j) const {
    const char* at = tile_ + dev::multiply_wide(j, key_tile_bytes_);
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      // x, y: queries 0..7 against keys 0..7 and 8..15; z, w: queries 8..15.
      const Word4 v = dev::load_global<Word4>(at + m * 512);
      words[m][0] = dev::transpose_matrix(v.x);
      words[m][1] = dev::transpose_matrix(v.z);
      words[m][2] = dev::transpose_matrix(v.y);
      words[m][3] = dev::transpose_matrix(v.w);
    }
  }
  // C operand of the first 8 keys (e = 0) or the others.
  TGA_DEVICE void operand(float (&c)[T::kRowTiles][4], const uint32_t (&words)[T::kRowTiles][4], int e) const {
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      scale_bias<T::kType>(c[m], words[m], e, inverse_scale_);
    }
  }

 private:
  float inverse_scale_;
  int key_tile_bytes_;
  const char* data_;
  const char* tile_ = nullptr;
};

}  // namespace torch_gated_attn::cuda
