// SPDX-License-Identifier: BSD-3-Clause
//
// Backward of plain.cuh: one kernel per kind of row, no partial sums between blocks.
#pragma once

#include "plain.cuh"

namespace torch_gated_attn::cuda {

template <class T>
struct PlainRow {
  T shift, inverse_sum, delta;

  TGA_DEVICE static PlainRow load(const PlainParams<T>& p, int64_t row) {
    const T* terms = p.row_terms + row * 3;
    return {dev::load_global<T>(terms), dev::load_global<T>(terms + 1), dev::load_global<T>(terms + 2)};
  }
  TGA_DEVICE T probability(T logit) const {
    return shift == INFINITY || logit == -INFINITY ? T(0) : dev::exp2(logit - shift) * inverse_sum;
  }
};

// One thread per query: dO, delta, dGate.
template <class T>
TGA_KERNEL(kPlainThreads, 1)
plain_rows_kernel(TGA_PARAMS PlainParams<T> p) {
  const PlainPlace place = plain_place(p, p.heads, p.q_len, kPlainThreads);
  const int query = place.first + dev::thread_index();
  if (query >= p.q_len) {
    return;
  }
  const auto at = [&](const Operand& o) { return rows_of<T>(o, place.slab, place.batch_row, place.head); };
  const T *const grad = at(p.grad_out), *const out = at(p.out), *const gate = at(p.gate);
  T* const d_gate = at(p.d_gate);
  const int64_t row = place.entry * p.q_len + query;
  T delta = 0, head_gate = 0;
  for (int d = 0; d < p.value_dim; ++d) {
    const T dy = grad == nullptr ? T(0) : dev::load_global<T>(grad + query * p.grad_out.row + d * p.grad_out.col);
    const T term = grad == nullptr ? T(0) : dy * dev::load_global<T>(out + query * p.out.row + d);
    const T g = gate_at(gate, p.gate, query, d);
    delta += term;
    head_gate += term * (1 - g);
    if (d_gate != nullptr && p.d_gate.col != 0) {
      dev::store_global(d_gate + query * p.d_gate.row + d * p.d_gate.col, term * (1 - g));
    }
    dev::store_global(p.core_grad + row * p.value_dim + d, dy * g);
  }
  if (d_gate != nullptr && p.d_gate.col == 0) {
    dev::store_global(d_gate + query * p.d_gate.row, head_gate);
  }
  if (p.grad_lse.data != nullptr) {
    delta -= dev::load_global<T>(at(p.grad_lse) + query * p.grad_lse.row);
  }
  const T sum = dev::load_global<T>(at(p.row_sum) + query * p.row_sum.row);
  T* const terms = p.row_terms + row * 3;
  dev::store_global(terms, sum == 0 ? T(INFINITY) : dev::load_global<T>(at(p.row_max) + query * p.row_max.row));
  dev::store_global(terms + 1, sum == 0 ? T(0) : T(1) / sum);
  dev::store_global(terms + 2, sum == 0 ? T(0) : delta);
}

template <class T, int kHeadDim>
TGA_KERNEL(kPlainThreads, 1)
plain_query_kernel(TGA_PARAMS PlainParams<T> p) {
  constexpr uint32_t kRowBytes = kHeadDim * sizeof(T), kTileBytes = kPlainTile * kRowBytes;
  const PlainPlace place = plain_place(p, p.heads, p.q_len, kPlainThreads);
  const int query = place.first + dev::thread_index(), kv_head = place.head / (p.heads / p.kv_heads);
  const bool exists = query < p.q_len;
  const int64_t row_index = place.entry * p.q_len + query;
  const PlainLogits<T> logits(p, place.slab, place.batch_row, place.head);
  T row[kHeadDim], grad[kHeadDim], d_row[kHeadDim];
  load_row(row, exists ? rows_of<T>(p.query, place.slab, place.batch_row, place.head) + query * p.query.row : nullptr,
           p.head_dim);
  load_row(grad, exists ? p.core_grad + row_index * p.value_dim : nullptr, p.value_dim);
  TGA_UNROLL
  for (int d = 0; d < kHeadDim; ++d) {
    d_row[d] = 0;
  }
  PlainRow<T> terms = {};
  if (exists) {
    terms = PlainRow<T>::load(p, row_index);
  }
  const uint32_t shared = dev::shared_base();
  const Range<int> seen = logits.keys_of(place.first);
  for (int first = seen.begin; first < seen.end; first += kPlainTile) {
    const uint32_t attended = logits.attended_keys(query, first);
    if (!dev::sync_block_any(attended != 0)) {
      continue;
    }
    count_plain_tile(p, place, place.head, first, true);
    stage_rows<T, kHeadDim>(shared, rows_of<T>(p.key, place.slab, place.batch_row, kv_head), p.key.row, first, p.k_len,
                            p.head_dim);
    stage_rows<T, kHeadDim>(shared + kTileBytes, rows_of<T>(p.value, place.slab, place.batch_row, kv_head), p.value.row,
                            first, p.k_len, p.value_dim);
    dev::sync_block();
    for (int j = 0; j < kPlainTile; ++j) {
      if ((attended >> j & 1) == 0) {
        continue;
      }
      const T prob = terms.probability(logits(query, first + j, dot(row, shared + j * kRowBytes)));
      const T d_score = prob * (dot(grad, shared + kTileBytes + j * kRowBytes) - terms.delta);
      add_scaled(d_row, d_score, shared + j * kRowBytes);
    }
  }
  if (exists) {
    T* const to = rows_of<T>(p.d_query, place.slab, place.batch_row, place.head) + query * p.d_query.row;
    TGA_UNROLL
    for (int d = 0; d < kHeadDim; ++d) {
      if (d < p.head_dim) {
        dev::store_global(to + d, d_row[d] * static_cast<T>(p.exact_scale));
      }
    }
  }
}

template <class T, int kHeadDim>
TGA_KERNEL(kPlainThreads, 1)
plain_key_kernel(TGA_PARAMS PlainParams<T> p) {
  constexpr uint32_t kRowBytes = kHeadDim * sizeof(T), kTileBytes = kPlainTile * kRowBytes;
  const PlainPlace place = plain_place(p, p.kv_heads, p.k_len, kPlainThreads);
  const int key = place.first + dev::thread_index(), heads_per_kv = p.heads / p.kv_heads;
  const bool exists = key < p.k_len;
  T row[kHeadDim], value[kHeadDim], d_row[kHeadDim], d_value[kHeadDim];
  load_row(row, exists ? rows_of<T>(p.key, place.slab, place.batch_row, place.head) + key * p.key.row : nullptr,
           p.head_dim);
  load_row(value, exists ? rows_of<T>(p.value, place.slab, place.batch_row, place.head) + key * p.value.row : nullptr,
           p.value_dim);
  TGA_UNROLL
  for (int d = 0; d < kHeadDim; ++d) {
    d_row[d] = d_value[d] = 0;
  }
  const uint32_t shared = dev::shared_base();
  for (int head = place.head * heads_per_kv; head < (place.head + 1) * heads_per_kv; ++head) {
    const PlainLogits<T> logits(p, place.slab, place.batch_row, head);
    const int64_t first_row = (place.entry / p.kv_heads * p.heads + head) * p.q_len;
    const Range<int> seen = logits.queries_of(place.first);
    for (int first = seen.begin; first < seen.end; first += kPlainTile) {
      const uint32_t attending = logits.attending_queries(first, key);
      if (!dev::sync_block_any(attending != 0)) {
        continue;
      }
      count_plain_tile(p, place, head, first, false);
      stage_rows<T, kHeadDim>(shared, rows_of<T>(p.query, place.slab, place.batch_row, head), p.query.row, first, p.q_len,
                              p.head_dim);
      stage_rows<T, kHeadDim>(shared + kTileBytes, p.core_grad + first_row * p.value_dim, p.value_dim, first, p.q_len,
                              p.value_dim);
      dev::sync_block();
      for (int j = 0; j < kPlainTile; ++j) {
        if ((attending >> j & 1) == 0) {
          continue;
        }
        const PlainRow<T> terms = PlainRow<T>::load(p, first_row + first + j);
        if (terms.shift == INFINITY) {
          continue;
        }
        const uint32_t query_row = shared + j * kRowBytes, grad_row = query_row + kTileBytes;
        const T prob = terms.probability(logits(first + j, key, dot(row, query_row)));
        add_scaled(d_value, prob, grad_row);
        add_scaled(d_row, prob * (dot(value, grad_row) - terms.delta), query_row);
      }
    }
    // What queries that attend to nothing give to every value.
    for (int query = 0; p.mean_rows && exists && query < p.q_len; ++query) {
      if (PlainRow<T>::load(p, first_row + query).shift == INFINITY) {
        const T* const grad = p.core_grad + (first_row + query) * p.value_dim;
        TGA_UNROLL
        for (int d = 0; d < kHeadDim; ++d) {
          d_value[d] += d < p.value_dim ? dev::load_global<T>(grad + d) / p.k_len : T(0);
        }
      }
    }
  }
  if (!exists) {
    return;
  }
  TGA_UNROLL
  for (int d = 0; d < kHeadDim; ++d) {
    if (p.d_key.data != nullptr && d < p.head_dim) {
      dev::store_global(rows_of<T>(p.d_key, place.slab, place.batch_row, place.head) + key * p.d_key.row + d,
                        d_row[d] * static_cast<T>(p.exact_scale));
    }
    if (p.d_value.data != nullptr && d < p.value_dim) {
      dev::store_global(rows_of<T>(p.d_value, place.slab, place.batch_row, place.head) + key * p.d_value.row + d,
                        d_value[d]);
    }
  }
}

// One thread per element of dBias, which walks everything the bias is broadcast along in a fixed order.
template <class T>
TGA_KERNEL(kPlainThreads, 1)
plain_bias_kernel(TGA_PARAMS PlainParams<T> p) {
  const int64_t index = (p.first_block + dev::block_index()) * kPlainThreads + dev::thread_index();
  const int heads = p.d_bias.head == 0 ? 1 : p.heads, queries = p.d_bias.row == 0 ? 1 : p.q_len,
            keys = p.d_bias.col == 0 ? 1 : p.k_len;
  const int key = static_cast<int>(index % keys), query = static_cast<int>(index / keys % queries);
  const int head = static_cast<int>(index / keys / queries % heads);
  const int64_t outer = index / keys / queries / heads;
  if (outer >= p.batch.slabs / p.batch.slabs_per_outer) {
    return;
  }
  T sum = 0;
  for (int64_t s = outer * p.batch.slabs_per_outer; s < (outer + 1) * p.batch.slabs_per_outer; ++s) {
    const SlabIndex slab = slab_index(p.batch, s);
    for (int64_t r = 0; r < p.batch.rows; ++r) {
      for (int h = head; h < (heads == 1 ? p.heads : head + 1); ++h) {
        const int kv_head = h / (p.heads / p.kv_heads);
        const PlainLogits<T> logits(p, slab, r, h);
        for (int q = query; q < (queries == 1 ? p.q_len : query + 1); ++q) {
          const T* const query_row = rows_of<T>(p.query, slab, r, h) + q * p.query.row;
          const int64_t row = ((s * p.batch.rows + r) * p.heads + h) * p.q_len + q;
          const PlainRow<T> terms = PlainRow<T>::load(p, row);
          for (int k = key; k < (keys == 1 ? p.k_len : key + 1); ++k) {
            if (!logits.attended(q, k) || terms.shift == INFINITY) {
              continue;
            }
            const T* const key_row = rows_of<T>(p.key, slab, r, kv_head) + k * p.key.row;
            const T* const value_row = rows_of<T>(p.value, slab, r, kv_head) + k * p.value.row;
            T product = 0, d_prob = 0;
            for (int d = 0; d < p.head_dim; ++d) {
              product += dev::load_global<T>(query_row + d) * dev::load_global<T>(key_row + d);
            }
            for (int d = 0; d < p.value_dim; ++d) {
              d_prob += dev::load_global<T>(p.core_grad + row * p.value_dim + d) * dev::load_global<T>(value_row + d);
            }
            sum += terms.probability(logits(q, k, product)) * (d_prob - terms.delta);
          }
        }
      }
    }
  }
  dev::store_global(rows_of<T>(p.d_bias, slab_index(p.batch, outer * p.batch.slabs_per_outer), 0, head) +
                        query * p.d_bias.row + key * p.d_bias.col,
                    sum);
}

}  // namespace torch_gated_attn::cuda
