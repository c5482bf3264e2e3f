// SPDX-License-Identifier: BSD-3-Clause
//
// From a score, the accumulator of the product of queries and keys, to a logit and to 2^(logit - shift). All kernels come
// here, so that the backward finds the very logits whose sums the forward has stored.
#pragma once

#include "fragments.cuh"
#include "sight.cuh"

namespace torch_gated_attn::cuda {

// The place of element `offset` of 2- or 4-byte elements; null stays null.
TGA_DEVICE const void* element(const void* data, int64_t offset, bool is_float) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + offset * (is_float ? 4 : 2);
}

// One element at a time, any strides, either type: the general kernels' access to the bias.
template <DType kType>
struct GeneralBias {
  const void* data;  // of this batch entry and head, null without
  int64_t row, col;
  bool is_float;

  TGA_DEVICE GeneralBias(const AttentionParams& p, const SlabIndex& slab, int64_t batch_row, int head)
      : data(element(p.bias.data, p.bias.offset(slab, batch_row, head), p.bias_is_float)),
        row(p.bias.row),
        col(p.bias.col),
        is_float(p.bias_is_float) {}

  // The logit of an existing pair in units of log2, from its scaled product in the same units.
  TGA_DEVICE float operator()(int64_t query, int64_t key, float product) const {
    if (data == nullptr) {
      return product;
    }
    const int64_t at = query * row + key * col;
    const float b = is_float ? dev::load_global<float>(static_cast<const float*>(data) + at)
                             : dev::unpack<kType>(dev::load_global<uint16_t>(static_cast<const uint16_t*>(data) + at)).x;
    return dev::fma_toward_zero(b, kLog2e, product);
  }
};

// The score of a pair that may be excluded; of a general kernel its logit.
template <class T>
TGA_DEVICE float visible_score(float score, bool attended, const GeneralBias<T::kType>& bias, const AttentionParams& p,
                               int query, int key) {
  if (!attended) {
    return -INFINITY;
  }
  if constexpr (T::kGeneral) {
    return query < p.q_len ? bias(query, key, dev::multiply(score, p.scale * kLog2e)) : -INFINITY;
  }
  return score;
}

// What turns scores into logits in units of log2: |scale| goes into the exponent and its sign into the queries or keys;
// the general kernels' scores are logits, and those of float32 too, once score_pairs() has multiplied them.
template <class T>
TGA_DEVICE float score_factor(const AttentionParams& p) {
  return T::kGeneral ? 1.0f : (T::kTf32 ? p.scale : fabsf(p.scale)) * kLog2e;
}
template <class T>
TGA_DEVICE float logit(float score, float factor) {
  return T::kLogits ? score : dev::multiply(score, factor);
}

// The scores of 16 x 8 pairs, a, b and `subtile` as for multiply(). The bias is the accumulator of their product; in
// float32 it joins after the product has been scaled, which leaves it its bits.
template <class T, bool kTransposed = false>
TGA_DEVICE void score_pairs(float (&score)[4], const uint32_t (&a)[T::kFragments][4],
                            const uint32_t (&b)[(T::kSteps + 1) / 2][4], int subtile, const float (&bias)[4],
                            float factor) {
  if constexpr (T::kTf32) {
    multiply_tf32<T, kTransposed>(score, a, b);
    TGA_UNROLL
    for (int i = 0; i < 4; ++i) {
      score[i] = dev::multiply(score[i], factor);
      if constexpr (T::kBiasFragments) {
        score[i] = dev::fma_toward_zero(bias[i], kLog2e, score[i]);
      }
    }
  } else if constexpr (T::kBiasFragments) {
    multiply<T>(score, a, b, subtile, bias);
  } else {
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply<T>(score, a, b, subtile, zero);
  }
}

// 2^(logit - shift). The logit is rounded like the largest one of its row, which the shift is: in a row of very low logits
// a fused multiply-add would leave the rounding of the largest, of any size, as an exponent.
template <class T>
TGA_DEVICE float exponential(float score, float factor, float shift) {
  return dev::exp2(logit<T>(score, factor) - shift);
}

}  // namespace torch_gated_attn::cuda
