// SPDX-License-Identifier: BSD-3-Clause
//
// Torch-free description of one call, built by the device launchers (describe.h) and read by the kernels.
#pragma once

#include <cstdint>

#include "visibility.h"

namespace torch_gated_attn {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Batch dimensions that behave alike for every operand are merged; four is what the models with the most need
// (templates x samples x rows, and one to spare).
constexpr int kMaxBatchDims = 4;

// How one operand is walked. Strides count elements and are 0 where the operand is broadcast.
struct View {
  void* data = nullptr;  // nullptr: the operand is absent
  int64_t batch[kMaxBatchDims] = {};
  int64_t head = 0, row = 0, col = 0;  // row: query or key position; col: head_dim, or the key for bias and mask
};

// Batch entries are numbered outer * rows + row: the bias is the same for all `rows` of one `outer` index, so a kernel
// loads it once for all of them and sums its gradient over them.
struct Problem {
  DType dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;           // dtype, or float32 where that has 16 bits
  int64_t batch[kMaxBatchDims] = {1, 1, 1, 1};  // sizes of the merged batch dimensions, product = outer * rows
  int64_t outer = 1, rows = 1;
  int64_t heads = 0, kv_heads = 0, q_len = 0, k_len = 0, head_dim = 0, value_dim = 0;
  double scale = 1;
  bool mean_rows = false;  // masked_rows == "mean"
  bool is_causal = false;
  int64_t window = 0;  // keys that a query sees; 0: no limit

  View query, key, value, gate, bias, mask, out;  // mask: one byte each
  View lse, row_max, row_sum;                     // [*, H, Q], accumulation type
  View key_lengths;                               // [*], int64: keys of a batch entry that exist

  // Backward only. `out` is read there, the others above are as in the forward.
  View grad_out, grad_lse;
  View d_query, d_key, d_value, d_gate;
  View d_bias;  // accumulation type, strides 0 where the bias is broadcast
};

// A mask that is the same for all queries of a key/value head selects keys; any other mask changes logits.
inline bool masks_keys(const Problem& p) {
  return p.mask.data && p.mask.row == 0 && (p.mask.head == 0 || p.heads == p.kv_heads);
}
// What queries see of all keys, and of those of the batch entry whose offset into key_lengths is `offset`.
inline Visibility<int64_t> visibility(const Problem& p) {
  Visibility<int64_t> v;
  v.q_len = p.q_len, v.k_len = v.length = p.k_len, v.window = p.window, v.causal = p.is_causal;
  return v;
}
inline Visibility<int64_t> visibility(const Problem& p, int64_t offset) {
  Visibility<int64_t> v = visibility(p);
  if (p.key_lengths.data) {
    const int64_t length = static_cast<const int64_t*>(p.key_lengths.data)[offset];
    v.length = length < 0 ? 0 : length < p.k_len ? length : p.k_len;
  }
  return v;
}
// So few queries per key/value head that they get a path of their own (cpu/few_queries_*.h), whose units take all heads of
// their rows: where a lane per query would leave most idle, and twice as many where a lane per dimension leaves none idle,
// so that decoding with grouped heads reads its cache at the speed of memory. Whatever gradients are wanted: a backward
// must repeat the scores of the forward, whose sums it divides by.
constexpr int64_t kFewQueries = 4, kFewWideQueries = 8, kWideHead = 64;
inline bool has_few_queries(const Problem& p) {
  const int64_t queries = p.heads / p.kv_heads * p.q_len;
  const bool wide = p.head_dim >= kWideHead && p.value_dim >= kWideHead;
  return queries <= (wide ? kFewWideQueries : kFewQueries);
}

// Whether each element of a d_bias slice comes from one query, head and key of a unit of work, which then stores it;
// otherwise they are added to the slice, row by row where queries are few.
inline bool d_bias_is_stored(const Problem& p) {
  return !has_few_queries(p) && p.d_bias.row != 0 && p.d_bias.col != 0 && (p.d_bias.head != 0 || p.heads == p.kv_heads);
}

}  // namespace torch_gated_attn
