// SPDX-License-Identifier: BSD-3-Clause
//
// Float32 and float64 without tensor cores: a thread owns a query (or key) row, rows of the other side pass through shared
// memory, every product is a multiply-add of the type itself. Bound by those multiply-adds: 4 * head_dim of them per score
// forward and backward alike would be the least for two products; correctness, not speed, is what float64 is for here.
#pragma once

#include "device.cuh"
#include "params.h"
#include "sight.cuh"

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
  Visibility<int> seen;
  int64_t bias_row, bias_col, mask_row, mask_col;
  T factor;

  TGA_DEVICE PlainLogits(const PlainParams<T>& p, const SlabIndex& slab, int64_t batch_row, int head)
      : bias(rows_of<T>(p.bias, slab, batch_row, head)),
        mask(mask_of(p, slab, batch_row, head)),
        seen(visibility(p, key_length(p, slab, batch_row))),
        bias_row(p.bias.row),
        bias_col(p.bias.col),
        mask_row(p.mask.row),
        mask_col(p.mask.col),
        factor(static_cast<T>(p.exact_scale * kPlainLog2e)) {}

  TGA_DEVICE bool attended(int query, int key) const {
    return seen.sees(query, key) &&
           (mask == nullptr || dev::load_global<uint8_t>(mask + query * mask_row + key * mask_col) != 0);
  }
  // Of the tiles of kPlainTile keys or queries those that a block of the others may attend to: [begin, end), begin a
  // multiple of the tile.
  static TGA_DEVICE Range<int> whole_tiles(int begin, int end) { return {begin / kPlainTile * kPlainTile, end}; }
  TGA_DEVICE Range<int> keys_of(int first_query) const {
    const Range<int> keys = seen.keys_of({first_query, least(first_query + kPlainThreads, seen.q_len)});
    return whole_tiles(keys.begin, keys.end);
  }
  TGA_DEVICE Range<int> queries_of(int first_key) const {
    Visibility<int64_t> wide;
    wide.q_len = seen.q_len, wide.k_len = seen.k_len, wide.length = seen.length, wide.window = seen.window;
    wide.causal = seen.causal;
    const Range<int64_t> queries = wide.queries_of({first_key, first_key + kPlainThreads});
    return whole_tiles(static_cast<int>(queries.begin), static_cast<int>(queries.end));
  }
  // A bit for each key of a tile that the query attends to, and for each query that attends to the key.
  TGA_DEVICE uint32_t attended_keys(int query, int first) const {
    uint32_t bits = 0;
    for (int j = 0; j < kPlainTile && query < seen.q_len; ++j) {
      bits |= static_cast<uint32_t>(attended(query, first + j)) << j;
    }
    return bits;
  }
  TGA_DEVICE uint32_t attending_queries(int first, int key) const {
    uint32_t bits = 0;
    for (int j = 0; j < kPlainTile && first + j < seen.q_len && key < seen.k_len; ++j) {
      bits |= static_cast<uint32_t>(attended(first + j, key)) << j;
    }
    return bits;
  }
  // The logit of an attended pair.
  TGA_DEVICE T operator()(int64_t query, int64_t key, T product) const {
    if (bias == nullptr) {
      return product * factor;
    }
    const T b = dev::load_global<T>(bias + query * bias_row + key * bias_col);
    return dev::fma_toward_zero(b, static_cast<T>(kPlainLog2e), product * factor);
  }

 private:
  static TGA_DEVICE int least(int a, int b) { return a < b ? a : b; }
};

// Tells the emulator of a tile, whose numbers are those of a thread's block.
template <class T>
TGA_DEVICE void count_plain_tile(const PlainParams<T>& p, const PlainPlace& place, int head, int first, bool keys) {
  if (dev::thread_index() == 0) {
    const int64_t entry = place.entry / (keys ? p.heads : p.kv_heads);
    dev::count_tile(entry, head, keys ? place.first : first, keys ? kPlainThreads : kPlainTile, keys ? first : place.first,
                    keys ? kPlainTile : kPlainThreads, true);
  }
}

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
  const Range<int> seen = logits.keys_of(place.first);
  for (int first = seen.begin; first < seen.end; first += kPlainTile) {
    const uint32_t attended = logits.attended_keys(query, first);
    if (!dev::sync_block_any(attended != 0)) {
      continue;
    }
    count_plain_tile(p, place, place.head, first, true);
    stage_rows<T, kHeadDim>(shared, keys, p.key.row, first, p.k_len, p.head_dim);
    stage_rows<T, kHeadDim>(shared + kTileBytes, values, p.value.row, first, p.k_len, p.value_dim);
    dev::sync_block();
    for (int j = 0; j < kPlainTile; ++j) {
      if ((attended >> j & 1) == 0) {
        continue;
      }
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
