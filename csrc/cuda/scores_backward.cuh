// SPDX-License-Identifier: BSD-3-Clause
//
// What all kernels of the backward share: the terms of a row, P = 2^(logit - shift), and where dBias goes.
#pragma once

#include "bias.cuh"

namespace torch_gated_attn::cuda {

template <class T>
TGA_DEVICE const typename T::Element* operand_rows(const Operand& o, const SlabIndex& slab, int64_t batch_row, int head) {
  return static_cast<const typename T::Element*>(o.data) + o.offset(slab, batch_row, head);
}

// Rows of dO from `first` on, of an entry of scratch_entry().
template <class T>
TGA_DEVICE const typename T::Element* core_grad_rows(const BackwardParams& p, int64_t entry, int first) {
  return static_cast<const typename T::Element*>(p.core_grad) + (entry * p.q_padded + first) * T::kHeadDim;
}

// Index of (slab, batch row, head) in the scratch arrays.
TGA_DEVICE int64_t scratch_entry(const BackwardParams& p, int64_t slab, int64_t batch_row, int head) {
  return (slab * p.batch.rows + batch_row) * p.heads + head;
}

// Shift of a query and -delta, from row_terms of its entry.
struct RowTerms {
  float shift, negative_delta;
};
TGA_DEVICE RowTerms load_row_terms(const float* terms, int query) {
  const float* pair = terms + query / 2 * 8 + query % 2;
  return {dev::load_global<float>(pair + 4), dev::load_global<float>(pair)};
}

// From this size of the shift on, shift + log2(sum) would lose bits of the sum (float32 keeps 2^-10 at 2^13): the row's
// probabilities stay unnormalised, 1 / sum goes into dO and delta instead, and a fused multiply-add is no longer good
// enough for the exponent. +inf is the shift of rows that attend nothing. Of float32 rows all probabilities stay
// unnormalised: no bit is to be lost.
constexpr float kLargestFoldedShift = 8192.0f;
TGA_DEVICE bool is_low_row(float shift) { return fabsf(shift) >= kLargestFoldedShift && shift < INFINITY; }

// 2^(logit - shift); kLow: right for low rows too, for an instruction more.
template <class T, bool kLow>
TGA_DEVICE float probability(float score, float factor, float shift) {
  if constexpr (kLow || T::kLogits) {
    return exponential<T>(score, factor, shift);
  } else {
    return dev::exp2(fmaf(score, factor, -shift));
  }
}

// dS; kMasked: of a hidden pair it is 0, whatever its key holds.
template <bool kMasked>
TGA_DEVICE float score_grad(float prob, float d_prob) {
  return kMasked && prob == 0.0f ? 0.0f : prob * d_prob;
}

// Index of the bias (or dBias) of a slab and head among those that differ.
TGA_DEVICE int64_t bias_entry(const BackwardParams& p, int64_t slab, int head) {
  const int64_t outer = slab / p.batch.slabs_per_outer;
  return p.bias.head == 0 ? outer : outer * p.heads + head;
}

// Fragment (query tile, key tile) of one part of the dBias partials; a thread's four values are contiguous.
struct PartialFragments {
  float* base;
  int64_t query_tile_stride;

  TGA_DEVICE PartialFragments(const BackwardParams& p, int64_t slab, int64_t chunk, int head) {
    const int64_t outer = slab / p.batch.slabs_per_outer, outers = p.batch.slabs / p.batch.slabs_per_outer;
    const int64_t part = slab % p.batch.slabs_per_outer * p.chunks + chunk;
    const int64_t plane = static_cast<int64_t>(p.q_padded) * p.k_padded;
    base = p.partial + ((part * outers + outer) * p.heads + head) * plane + this_lane().index * 4;
    query_tile_stride = static_cast<int64_t>(p.k_padded / 8) * 128;
  }
  TGA_DEVICE float* at(int query, int key) const { return base + query / 16 * query_tile_stride + key / 8 * 128; }
};

// Stores a fragment of dBias whose first row and column are `query` and `key`.
template <DType kType>
TGA_DEVICE void store_bias_grad(const BackwardParams& p, const PartialFragments& partial, int64_t direct_offset, int query,
                                int key, const Float4& sum) {
  if (!p.d_bias_direct) {
    dev::store_global(partial.at(query, key), sum);
    return;
  }
  const Lane lane = this_lane();
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  TGA_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int q = query + lane.row + e / 2 * 8, k = key + lane.pair * 2 + e % 2;
    if (q < p.q_len && k < p.k_len) {
      store_value<kType>(p.d_bias.data, direct_offset + q * p.d_bias.row + k * p.d_bias.col, values[e], p.d_bias_is_float);
    }
  }
}

}  // namespace torch_gated_attn::cuda
