// SPDX-License-Identifier: BSD-3-Clause
//
// What the backward computes once per row before it looks at scores: dGate, delta, dO = grad_out * sigmoid(gate), and the
// bias reordered as fragments of the transposed scores. Bound by memory.
#pragma once

#include "gate.cuh"
#include "scores_backward.cuh"

namespace torch_gated_attn::cuda {

constexpr int kPrepareThreads = 128;

// `lanes` neighbouring threads take one row, 8 columns each.
template <int kHeadDim>
struct PrepareShape {
  static constexpr int kLanes = next_power_of_two(kHeadDim) / 8;
  static constexpr int kRowsPerBlock = kPrepareThreads / kLanes;
};

// Columns `col` to `col` + 7 of a row of grad_out, whose last dimension may have any stride.
template <DType kType>
TGA_DEVICE Chunk<kType> load_grad_chunk(const BackwardParams& p, const ElementOf<kType>* row, int col) {
  if (p.grad_out.col == 1) {
    return load_chunk<kType, false>(row, col, p.value_dim, p.grad_pairs_aligned);
  }
  float x[8];
  TGA_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = col + i < p.value_dim ? load_value<kType>(row + (col + i) * p.grad_out.col) : 0.0f;
  }
  return pack_chunk<kType>(x);
}

// Columns `col` to `col` + 7 of a row of dGate, which begins at element `row`.
template <DType kType>
TGA_DEVICE void store_gate_grad(const BackwardParams& p, int64_t row, int col, const float (&x)[8]) {
  if (p.d_gate_is_float) {
    store_chunk<DType::kFloat32, false>(static_cast<float*>(p.d_gate.data) + row, col, p.value_dim, false,
                                        pack_chunk<DType::kFloat32>(x));
  } else {
    store_chunk<kType, false>(static_cast<ElementOf<kType>*>(p.d_gate.data) + row, col, p.value_dim, p.aligned,
                              pack_chunk<kType>(x));
  }
}

template <DType kType, int kHeadDim>
TGA_KERNEL(kPrepareThreads, 1)
prepare_rows_kernel(TGA_PARAMS BackwardParams p) {
  using Shape = PrepareShape<kHeadDim>;
  using Element = ElementOf<kType>;
  constexpr bool kExact = kType == DType::kFloat32;  // dO is not rounded, and probabilities are not normalised
  int64_t index = (p.first_block + dev::block_index()) * Shape::kRowsPerBlock + dev::thread_index() / Shape::kLanes;
  const int first_col = dev::thread_index() % Shape::kLanes * 8;
  const int64_t total = p.batch.slabs * p.batch.rows * p.heads * p.q_even;
  const bool exists = index < total;
  const int64_t place = exists ? index : 0;
  const int query = static_cast<int>(place % p.q_even);
  const int64_t entry = place / p.q_even;  // (slab, batch row, head)
  const int head = static_cast<int>(entry % p.heads);
  const int64_t batch_row = entry / p.heads % p.batch.rows;
  const SlabIndex slab = slab_index(p.batch, entry / p.heads / p.batch.rows);
  const bool real = exists && query < p.q_len;

  float sum = 1.0f, shift = INFINITY, normaliser = 1.0f;
  if (real) {
    sum = dev::load_global<float>(static_cast<const float*>(p.row_sum.data) + p.row_sum.offset(slab, batch_row, head) +
                                  query * p.row_sum.row);
    const float max = dev::load_global<float>(static_cast<const float*>(p.row_max.data) +
                                              p.row_max.offset(slab, batch_row, head) + query * p.row_max.row);
    if (sum != 0.0f) {
      const bool fold = !kExact && !is_low_row(max);
      shift = fold ? max + dev::log2(sum) : max;
      normaliser = fold ? 1.0f : dev::reciprocal(sum);
    }
  }

  float delta = 0.0f, head_gate_grad = 0.0f;
  if (exists && first_col < kHeadDim) {
    const auto row_of = [&](const Operand& o) {
      return static_cast<const Element*>(o.data) + o.offset(slab, batch_row, head) + query * o.row;
    };
    const bool has_grad = real && p.grad_out.data != nullptr, has_gate = has_grad && p.gate.data != nullptr;
    Chunk<kType> grad_chunk = {}, out_chunk = {}, gate_chunk = {};
    if (has_grad) {
      grad_chunk = load_grad_chunk<kType>(p, row_of(p.grad_out), first_col);
      out_chunk = load_chunk<kType, false>(row_of(p.out), first_col, p.value_dim, p.aligned);
    }
    if (has_gate) {
      gate_chunk = load_gates<kType, false>(row_of(p.gate), p.gate.col, first_col, p.value_dim, p.aligned);
    }
    float grad[8], y[8], logit[8], gate_grad[8], core[8];
    unpack_chunk<kType>(grad, grad_chunk);
    unpack_chunk<kType>(y, out_chunk);
    unpack_chunk<kType>(logit, gate_chunk);
    GateFactor gate[8];
    TGA_UNROLL
    for (int i = 0; i < 8; ++i) {
      gate[i] = has_gate ? gate_factor<kType>(logit[i]) : GateFactor{1.0f, 1.0f};
      gate_grad[i] = grad[i] * y[i] * (1.0f - gate[i].open);
      head_gate_grad += gate_grad[i];
      core[i] = grad[i] * gate[i].open * normaliser;
    }
    if (real && p.d_gate.data != nullptr && p.d_gate.col != 0) {
      store_gate_grad<kType>(p, p.d_gate.offset(slab, batch_row, head) + query * p.d_gate.row, first_col, gate_grad);
    }
    const Chunk<kType> rounded = pack_chunk<kType>(core);
    TGA_UNROLL
    for (int i = 0; i < Chunk<kType>::kParts; ++i) {
      dev::store_global(static_cast<Element*>(p.core_grad) + place * kHeadDim + first_col + i * Chunk<kType>::kValues,
                        rounded.parts[i]);
    }
    // dP - delta comes from the rounded dO on both sides: its rounding then moves dP of all keys, but not their mean.
    unpack_chunk<kType>(core, rounded);
    TGA_UNROLL
    for (int i = 0; i < 8; ++i) {
      if constexpr (kExact) {
        delta += grad[i] * y[i] * normaliser;
      } else {
        delta += gate[i].open == 0.0f ? 0.0f : core[i] * (y[i] * gate[i].inverse);
      }
    }
  }
  TGA_UNROLL
  for (int lanes = 1; lanes < Shape::kLanes; lanes *= 2) {
    delta += dev::shuffle_xor(delta, lanes);
    head_gate_grad += dev::shuffle_xor(head_gate_grad, lanes);
  }
  if (!exists || first_col != 0) {
    return;
  }
  if (real && p.d_gate.data != nullptr && p.d_gate.col == 0) {
    store_value<kType>(p.d_gate.data, p.d_gate.offset(slab, batch_row, head) + query * p.d_gate.row, head_gate_grad,
                       p.d_gate_is_float);
  }
  if (real && p.grad_lse.data != nullptr) {
    delta -= dev::load_global<float>(static_cast<const float*>(p.grad_lse.data) + p.grad_lse.offset(slab, batch_row, head) +
                                     query * p.grad_lse.row) *
             normaliser;
  }
  const float negative_delta = shift == INFINITY ? 0.0f : -delta;
  float* const terms = p.row_terms + place / 2 * 8 + place % 2;
  dev::store_global(terms, negative_delta);
  dev::store_global(terms + 2, negative_delta);
  dev::store_global(terms + 4, shift);
  dev::store_global(terms + 6, is_low_row(shift) ? 1.0f : 0.0f);
}

// One thread writes 16 bytes of the reordered bias: 4 floats, already divided by the scale, or 8 halves as they are.
template <DType kType, bool kFloat>
TGA_KERNEL(kPrepareThreads, 1)
transpose_bias_kernel(TGA_PARAMS BackwardParams p) {
  constexpr int kTiles = kFloat ? 1 : 2;  // 8-wide column tiles to a fragment
  const int64_t index = (p.first_block + dev::block_index()) * kPrepareThreads + dev::thread_index();
  const Lane lane = this_lane();
  const int query_tiles = p.bias_queries / (8 * kTiles), key_tiles = p.k_padded / 16;
  const int64_t fragment = index / 32;
  const int query = static_cast<int>(fragment % query_tiles) * 8 * kTiles + lane.pair * 2;
  const int key = static_cast<int>(fragment / query_tiles % key_tiles) * 16 + lane.row;
  const int64_t entry = fragment / query_tiles / key_tiles;
  const int bias_heads = p.bias.head == 0 ? 1 : p.heads;
  const int64_t outer = entry / bias_heads;
  if (outer >= p.batch.slabs / p.batch.slabs_per_outer) {
    return;
  }
  const int64_t offset = p.bias.offset(slab_index(p.batch, outer * p.batch.slabs_per_outer), 0, entry % bias_heads);
  // Element e of column tile t: queries 8 * t + e % 2, keys + 8 in the upper half.
  const auto at = [&](int t, int e) { return offset + (query + 8 * t + e % 2) * p.bias.row + (key + e / 2 * 8); };
  const auto inside = [&](int t, int e) { return query + 8 * t + e % 2 < p.q_len && key + e / 2 * 8 < p.k_len; };
  if constexpr (kFloat) {
    const float inverse_scale = 1.0f / fabsf(p.scale);
    float v[4];
    TGA_UNROLL
    for (int e = 0; e < 4; ++e) {
      v[e] = inside(0, e) ? dev::multiply_toward_zero(
                                dev::load_global<float>(static_cast<const float*>(p.bias.data) + at(0, e)), inverse_scale)
                          : 0.0f;
    }
    dev::store_global(static_cast<float*>(p.bias_t) + index * 4, Float4{v[0], v[1], v[2], v[3]});
  } else {
    uint32_t v[4] = {};
    TGA_UNROLL
    for (int e = 0; e < 8; ++e) {
      if (inside(e / 4, e % 4)) {
        const uint32_t half = dev::load_global<uint16_t>(static_cast<const uint16_t*>(p.bias.data) + at(e / 4, e % 4));
        v[e / 2] |= half << (e % 2 * 16);
      }
    }
    dev::store_global(static_cast<uint16_t*>(p.bias_t) + index * 8, Word4{v[0], v[1], v[2], v[3]});
  }
}

}  // namespace torch_gated_attn::cuda
