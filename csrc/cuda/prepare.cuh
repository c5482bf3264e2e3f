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

template <DType kType>
TGA_DEVICE Float2 load_grad(const ElementOf<kType>* row, int64_t col_stride, int col, int cols, bool pairs_aligned) {
  if (col_stride == 1) {
    return load_values<kType>(row, col, cols, pairs_aligned);
  }
  return {col < cols ? load_value<kType>(row + col * col_stride) : 0.0f,
          col + 1 < cols ? load_value<kType>(row + (col + 1) * col_stride) : 0.0f};
}

template <DType kType>
TGA_DEVICE void store_gate_grad(const BackwardParams& p, int64_t at, int col, float x, float y) {
  if (p.d_gate_is_float) {
    store_pair<DType::kFloat32>(static_cast<float*>(p.d_gate.data) + at, col, p.value_dim, false, x, y);
  } else {
    store_pair<kType>(static_cast<ElementOf<kType>*>(p.d_gate.data) + at, col, p.value_dim, p.aligned, x, y);
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
  const int64_t total = p.batch.slabs * p.batch.rows * p.heads * p.q_padded;
  const bool exists = index < total;
  const int64_t place = exists ? index : 0;
  const int query = static_cast<int>(place % p.q_padded);
  const int64_t entry = place / p.q_padded;  // (slab, batch row, head)
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
  if (exists) {
    const auto row_of = [&](const Operand& o) {
      return static_cast<const Element*>(o.data) + o.offset(slab, batch_row, head) + query * o.row;
    };
    Element* const core = static_cast<Element*>(p.core_grad) + place * kHeadDim;
    TGA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int col = first_col + 2 * i;
      if (col >= kHeadDim) {
        continue;
      }
      Float2 grad = {0.0f, 0.0f}, gate = {1.0f, 1.0f}, y = {0.0f, 0.0f};
      if (real && p.grad_out.data != nullptr) {
        grad = load_grad<kType>(row_of(p.grad_out), p.grad_out.col, col, p.value_dim, p.grad_pairs_aligned);
        y = load_values<kType>(row_of(p.out), col, p.value_dim, p.aligned);
        if (p.gate.data != nullptr) {
          const Float2 logit = load_gate<kType>(row_of(p.gate), p.gate.col, col, p.value_dim, p.aligned);
          gate = {sigmoid(logit.x), sigmoid(logit.y)};
        }
        const Float2 gate_grad = {grad.x * y.x * (1.0f - gate.x), grad.y * y.y * (1.0f - gate.y)};
        head_gate_grad += gate_grad.x + gate_grad.y;
        if (p.d_gate.data != nullptr && p.d_gate.col != 0) {
          store_gate_grad<kType>(p, p.d_gate.offset(slab, batch_row, head) + query * p.d_gate.row, col, gate_grad.x,
                                 gate_grad.y);
        }
      } else if (real && p.d_gate.data != nullptr && p.d_gate.col != 0) {
        store_gate_grad<kType>(p, p.d_gate.offset(slab, batch_row, head) + query * p.d_gate.row, col, 0.0f, 0.0f);
      }
      if constexpr (kExact) {
        dev::store_global(core + col, Float2{grad.x * gate.x * normaliser, grad.y * gate.y * normaliser});
        delta += (grad.x * y.x + grad.y * y.y) * normaliser;
      } else {
        const uint32_t rounded = dev::pack<kType>(grad.x * gate.x * normaliser, grad.y * gate.y * normaliser);
        dev::store_global(core + col, rounded);
        // dP - delta comes from the rounded dO on both sides: its rounding then moves dP of all keys, but not their mean.
        const Float2 core_grad = dev::unpack<kType>(rounded);
        delta +=
            (gate.x == 0.0f ? 0.0f : core_grad.x * (y.x / gate.x)) + (gate.y == 0.0f ? 0.0f : core_grad.y * (y.y / gate.y));
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
  const int query_tiles = p.q_padded / (8 * kTiles), key_tiles = p.k_padded / 16;
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
