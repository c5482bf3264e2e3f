// SPDX-License-Identifier: BSD-3-Clause
#include "call.h"

#include <cmath>

namespace core_test {
namespace {

Sizes with(Sizes batch, int64_t heads, int64_t rows, int64_t cols) {
  batch.heads = heads, batch.rows = rows, batch.cols = cols;
  return batch;
}

void fill(Tensor& t, Numbers& numbers) {
  for_each(t.sizes, [&](const int64_t* b, int64_t h, int64_t r, int64_t c) {
    put(t.type, t.view.data, t.offset(b, h, r, c), numbers.next());
  });
}

// Broadcast over a drawn subset of the dimensions.
Sizes broadcast(Sizes s, Bytes& bytes) {
  for (int64_t& n : s.batch)
    if (bytes.flip()) n = 1;
  for (int64_t* n : {&s.heads, &s.rows, &s.cols})
    if (bytes.below(3) == 0) *n = 1;
  return s;
}

}  // namespace

Call::Call(Bytes& bytes, int64_t largest) {
  p.dtype = static_cast<DType>(bytes.below(4));
  p.kv_heads = 1 + bytes.below(2);
  p.heads = p.kv_heads * (1 + bytes.below(3));
  p.q_len = 1 + bytes.below(bytes.flip() ? 5 : largest);
  p.k_len = 1 + bytes.below(largest);
  // Enough of one of them, and few of the other, that a call's keys or queries are shared out.
  if (!bytes.usually(8)) p.q_len = 1 + bytes.below(3), p.k_len = 1000 + bytes.below(1500);
  if (!bytes.usually(8)) p.q_len = 200 + bytes.below(400), p.k_len = 1 + bytes.below(largest);
  p.head_dim = bytes.below(bytes.flip() ? 9 : largest);
  p.value_dim = bytes.below(bytes.flip() ? 9 : largest);
  p.scale = p.head_dim == 0 ? 0 : 1 / std::sqrt(static_cast<double>(p.head_dim));
  p.mean_rows = bytes.flip();
  Sizes batch{};
  for (int d = 0; d < torch_gated_attn::kMaxBatchDims; ++d) batch.batch[d] = p.batch[d] = 1 + bytes.below(d == 3 ? 4 : 2);
  Numbers numbers(static_cast<uint64_t>(bytes.below(1 << 16)));

  const size_t element = bytes_of(p.dtype);
  query = make(p.dtype, element, with(batch, p.heads, p.q_len, p.head_dim), bytes, false);
  key = make(p.dtype, element, with(batch, p.kv_heads, p.k_len, p.head_dim), bytes, false);
  value = make(p.dtype, element, with(batch, p.kv_heads, p.k_len, p.value_dim), bytes, false);
  for (Tensor* t : {&query, &key, &value}) fill(*t, numbers);
  draw_optional(bytes, numbers, batch);

  out = make(p.dtype, element, with(batch, p.heads, p.q_len, p.value_dim), bytes, false);
  const DType sum = sum_type(p.dtype);
  for (Tensor* t : {&lse, &row_max, &row_sum}) *t = make(sum, bytes_of(sum), with(batch, p.heads, p.q_len, 1), bytes, true);
  if (bytes.usually(8)) {
    grad_out = make(p.dtype, element, out.sizes, bytes, false);
    fill(grad_out, numbers);
  }
  if (bytes.flip()) {
    grad_lse = make(sum, bytes_of(sum), lse.sizes, bytes, false);
    fill(grad_lse, numbers);
  }
  draw_gradients(bytes);
  draw_visibility(bytes, numbers, batch);
  p.query = query.view, p.key = key.view, p.value = value.view, p.gate = gate.view, p.bias = bias.view;
  p.mask = mask.view, p.out = out.view, p.lse = lse.view, p.row_max = row_max.view, p.row_sum = row_sum.view;
}

// gate, bias and mask; the batch dimensions over which the bias is broadcast come last and are the rows that share it.
void Call::draw_optional(Bytes& bytes, Numbers& numbers, const Sizes& batch) {
  if (bytes.usually(4)) {
    const Sizes full = with(batch, p.heads, p.q_len, p.value_dim);
    Sizes s = bytes.flip() ? full : bytes.flip() ? with(batch, p.heads, p.q_len, 1) : broadcast(full, bytes);
    gate = make(p.dtype, bytes_of(p.dtype), s, bytes, false);
    fill(gate, numbers);
  }
  int outer_dims = 0;
  if (bytes.usually(4)) {
    Sizes s = broadcast(with(batch, p.heads, p.q_len, p.k_len), bytes);
    outer_dims = static_cast<int>(bytes.below(torch_gated_attn::kMaxBatchDims + 1));
    for (int d = 0; d < torch_gated_attn::kMaxBatchDims; ++d) s.batch[d] = d < outer_dims ? batch.batch[d] : 1;
    p.bias_dtype = bytes_of(p.dtype) == 2 && bytes.flip() ? DType::kFloat32 : p.dtype;
    bias = make(p.bias_dtype, bytes_of(p.bias_dtype), s, bytes, false);
    fill(bias, numbers);
  } else {
    p.bias_dtype = p.dtype;
  }
  for (int d = 0; d < torch_gated_attn::kMaxBatchDims; ++d) (d < outer_dims ? p.outer : p.rows) *= p.batch[d];
  if (bytes.usually(4)) {
    Sizes s = broadcast(with(batch, p.heads, p.q_len, p.k_len), bytes);
    mask = make(DType::kFloat32, 1, s, bytes, false);  // one byte each; the type says nothing
    const int64_t attended = bytes.below(4);           // of four keys
    for_each(s, [&](const int64_t* b, int64_t h, int64_t r, int64_t c) {
      static_cast<uint8_t*>(mask.view.data)[mask.offset(b, h, r, c)] =
          numbers.next() * 2 + 2 < static_cast<double>(attended);
    });
  }
}

// Windows and lengths at both ends and beyond them. The lengths come from `numbers`, as the elements of every tensor do:
// one for each of up to a thousand batch elements would use up the bytes.
void Call::draw_visibility(Bytes& bytes, Numbers& numbers, Sizes batch) {
  p.is_causal = bytes.flip();
  if (p.is_causal && bytes.flip()) p.window = 1 + bytes.below(p.k_len + 1);
  if (bytes.usually(3)) return;
  for (int64_t& n : batch.batch)
    if (bytes.below(4) == 0) n = 1;
  key_lengths = make(DType::kFloat64, sizeof(int64_t), with(batch, 1, 1, 1), bytes, false);
  for_each(key_lengths.sizes, [&](const int64_t* b, int64_t, int64_t, int64_t) {
    const double drawn = (numbers.next() + 1) / 2 * static_cast<double>(p.k_len + 4);
    static_cast<int64_t*>(key_lengths.view.data)[key_lengths.offset(b, 0, 0, 0)] = static_cast<int64_t>(drawn) - 1;
  });
  p.key_lengths = key_lengths.view;
}

void Call::draw_gradients(Bytes& bytes) {
  const size_t element = bytes_of(p.dtype);
  if (bytes.usually(4)) d_query = make(p.dtype, element, query.sizes, bytes, false);
  if (bytes.usually(4)) d_key = make(p.dtype, element, key.sizes, bytes, false);
  if (bytes.usually(4)) d_value = make(p.dtype, element, value.sizes, bytes, false);
  if (gate && bytes.usually(4)) {
    // As the launcher: a gate that is broadcast otherwise than over the head's dimensions gets a full gradient.
    Sizes s = gate.sizes, full = out.sizes;
    bool per_query = s.heads == full.heads && s.rows == full.rows;
    for (int d = 0; d < torch_gated_attn::kMaxBatchDims; ++d) per_query &= s.batch[d] == full.batch[d];
    d_gate = make(p.dtype, element, per_query ? s : full, bytes, false);
  }
  if (bias && bytes.usually(4)) {
    // One slice per group of rows, and per key/value head where heads share a bias, is cut from the outermost dimension.
    const DType sum = sum_type(p.dtype);
    d_bias = make(sum, bytes_of(sum), bias.sizes, bytes, true);
  }
}

}  // namespace core_test
