// SPDX-License-Identifier: BSD-3-Clause
//
// Float32 and float64 without tensor cores: a thread owns a query (or key) row, rows of the other side pass through shared
// memory, every product is a multiply-add of the type itself. Bound by those multiply-adds: 4 * head_dim of them per score
// forward and backward alike would be the least for two products; correctness, not speed, is what float64 is for here.
#pragma once

#include "device.cuh"
#include "params.h"

namespace torch_gated_attn::cuda {

constexpr int kPlainThreads = 128;
constexpr int kPlainTile =
    16;  // rows in shared memory at a time: two operands of 128 doubles each fit the 48 KiB of any device
constexpr double kPlainLog2e = 1.4426950408889634, kPlainLn2 = 0.6931471805599453;

template <class T>
TGA_DEVICE T* rows_of(const Operand& o, const SlabIndex& slab, int64_t batch_row, int64_t head) {
  return o.data == nullptr ? nullptr : static_cast<T*>(o.data) + o.offset(slab, batch_row, head);
}

// A row of a batch entry and head, rows counted across all of them.
struct PlainPlace {
  SlabIndex slab;
  int64_t entry, batch_row;  // entry: of [slabs, rows, heads]
  int head, first;           // first row of the block
};
TGA_DEVICE PlainPlace plain_place(const AttentionParams& p, int heads, int rows, int rows_per_block) {
  int64_t index = p.first_block + dev::block_index();
  const int blocks = (rows + rows_per_block - 1) / rows_per_block;
  PlainPlace place;
  place.first = static_cast<int>(index % blocks) * rows_per_block;
  place.entry = index / blocks;
  place.head = static_cast<int>(place.entry % heads);
  place.batch_row = place.entry / heads % p.batch.rows;
  place.slab = slab_index(p.batch, place.entry / heads / p.batch.rows);
  return place;
}

// The logit of a pair in units of log2, -inf where it is excluded.
template <class T>
struct PlainLogits {
  const T* bias;
  const uint8_t* mask;
  int64_t bias_row, bias_col, mask_row, mask_col;
  T factor;

  TGA_DEVICE PlainLogits(const PlainParams<T>& p, const SlabIndex& slab, int64_t batch_row, int head)
      : bias(rows_of<T>(p.bias, slab, batch_row, head)),
        mask(rows_of<uint8_t>(p.mask, slab, batch_row, head)),
        bias_row(p.bias.row),
        bias_col(p.bias.col),
        mask_row(p.mask.row),
        mask_col(p.mask.col),
        factor(static_cast<T>(p.exact_scale * kPlainLog2e)) {}

  TGA_DEVICE bool attended(int64_t query, int64_t key) const {
    return mask == nullptr || dev::load_global<uint8_t>(mask + query * mask_row + key * mask_col) != 0;
  }
  TGA_DEVICE T operator()(int64_t query, int64_t key, T product) const {
    if (!attended(query, key)) {
      return -INFINITY;
    }
    if (bias == nullptr) {
      return product * factor;
    }
    const T b = dev::load_global<T>(bias + query * bias_row + key * bias_col);
    return dev::fma_toward_zero(b, static_cast<T>(kPlainLog2e), product * factor);
  }
};

// Rows [first, first + kPlainTile) of an operand into shared memory, zeros past the ends.
template <class T, int kHeadDim>
TGA_DEVICE void stage_rows(uint32_t shared, const T* data, int64_t stride, int first, int rows, int cols) {
  for (int i = dev::thread_index(); i < kPlainTile * kHeadDim; i += kPlainThreads) {
    const int row = first + i / kHeadDim, col = i % kHeadDim;
    dev::store_shared(shared + i * static_cast<uint32_t>(sizeof(T)),
                      row < rows && col < cols ? dev::load_global<T>(data + row * stride + col) : T(0));
  }
}

template <class T, int kHeadDim>
TGA_DEVICE void load_row(T (&row)[kHeadDim], const T* data, int cols) {
  TGA_UNROLL
  for (int d = 0; d < kHeadDim; ++d) {
    row[d] = data != nullptr && d < cols ? dev::load_global<T>(data + d) : T(0);
  }
}

template <class T, int kHeadDim>
TGA_DEVICE T dot(const T (&row)[kHeadDim], uint32_t shared) {
  T sum = 0;
  TGA_UNROLL
  for (int d = 0; d < kHeadDim; ++d) {
    sum += row[d] * dev::load_shared<T>(shared + d * static_cast<uint32_t>(sizeof(T)));
  }
  return sum;
}

template <class T, int kHeadDim>
TGA_DEVICE void add_scaled(T (&row)[kHeadDim], T factor, uint32_t shared) {
  TGA_UNROLL
  for (int d = 0; d < kHeadDim; ++d) {
    row[d] += factor * dev::load_shared<T>(shared + d * static_cast<uint32_t>(sizeof(T)));
  }
}

template <class T>
TGA_DEVICE T plain_sigmoid(T x) {
  return dev::reciprocal(T(1) + dev::exp2(static_cast<T>(-kPlainLog2e) * x));
}
template <class T>
TGA_DEVICE T gate_at(const T* gate, const Operand& o, int64_t query, int col) {
  return gate == nullptr ? T(1) : plain_sigmoid(dev::load_global<T>(gate + query * o.row + col * o.col));
}

template <class T, int kHeadDim>
TGA_KERNEL(kPlainThreads, 1)
plain_forward_kernel(TGA_PARAMS PlainParams<T> p) {
  constexpr uint32_t kRowBytes = kHeadDim * sizeof(T), kTileBytes = kPlainTile * kRowBytes;
  const PlainPlace place = plain_place(p, p.heads, p.q_len, kPlainThreads);
  const int query = place.first + dev::thread_index(), kv_head = place.head / (p.heads / p.kv_heads);
  const bool exists = query < p.q_len;
  const T* const keys = rows_of<T>(p.key, place.slab, place.batch_row, kv_head);
  const T* const values = rows_of<T>(p.value, place.slab, place.batch_row, kv_head);
  const PlainLogits<T> logits(p, place.slab, place.batch_row, place.head);
  T row[kHeadDim], acc[kHeadDim], max = -INFINITY, sum = 0;
  load_row(row, exists ? rows_of<T>(p.query, place.slab, place.batch_row, place.head) + query * p.query.row : nullptr,
           p.head_dim);
  TGA_UNROLL
  for (int d = 0; d < kHeadDim; ++d) {
    acc[d] = 0;
  }
  const uint32_t shared = dev::shared_base();
  for (int first = 0; first < p.k_len; first += kPlainTile) {
    dev::sync_block();
    stage_rows<T, kHeadDim>(shared, keys, p.key.row, first, p.k_len, p.head_dim);
    stage_rows<T, kHeadDim>(shared + kTileBytes, values, p.value.row, first, p.k_len, p.value_dim);
    dev::sync_block();
    for (int j = 0; exists && j < kPlainTile && first + j < p.k_len; ++j) {
      const T s = logits(query, first + j, dot(row, shared + j * kRowBytes));
      if (s == -INFINITY) {
        continue;
      }
      if (s > max) {
        const T keep = dev::exp2(max - s);
        sum *= keep;
        TGA_UNROLL
        for (int d = 0; d < kHeadDim; ++d) {
          acc[d] *= keep;
        }
        max = s;
      }
      const T e = dev::exp2(s - max);
      sum += e;
      add_scaled(acc, e, shared + kTileBytes + j * kRowBytes);
    }
  }
  if (!exists) {
    return;
  }
  // A NaN logit leaves max alone but makes the sum NaN: not empty.
  const bool empty = sum == 0;
  if (empty && p.mean_rows) {
    for (int key = 0; key < p.k_len; ++key) {
      TGA_UNROLL
      for (int d = 0; d < kHeadDim; ++d) {
        acc[d] += d < p.value_dim ? dev::load_global<T>(values + key * p.value.row + d) : T(0);
      }
    }
  }
  const T inverse = empty ? (p.mean_rows ? T(1) / p.k_len : T(0)) : T(1) / sum;
  const T shift = max == -INFINITY ? T(0) : max;
  const auto store = [&](const Operand& to, T value) {
    dev::store_global(rows_of<T>(to, place.slab, place.batch_row, place.head) + query * to.row, value);
  };
  store(p.lse, empty ? -INFINITY : (shift + dev::log2(sum)) * static_cast<T>(kPlainLn2));
  store(p.row_max, shift);
  store(p.row_sum, sum);
  const T* const gate = rows_of<T>(p.gate, place.slab, place.batch_row, place.head);
  T* const out = rows_of<T>(p.out, place.slab, place.batch_row, place.head) + query * p.out.row;
  TGA_UNROLL
  for (int d = 0; d < kHeadDim; ++d) {
    if (d < p.value_dim) {
      dev::store_global(out + d, acc[d] * inverse * gate_at(gate, p.gate, query, d));
    }
  }
}

}  // namespace torch_gated_attn::cuda
