// SPDX-License-Identifier: BSD-3-Clause
//
// What the kernels are given: one plain struct by value. Made from a Problem by make_params.h.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "annotations.h"

namespace torch_gated_attn::cuda {

// How a kernel reaches the bias. The first three need 16-byte aligned operands and a scale whose inverse is harmless;
// kGeneral takes everything.
enum class BiasAccess { kNone, kHalf, kFloat, kGeneral };

// A batch entry is (slab, row): the rows of one slab are one batch dimension over which the bias is broadcast, so that they
// are a constant stride apart in every operand; the slabs are all other batch dimensions.
struct Batch {
  int64_t slab_sizes[kMaxBatchDims] = {1, 1, 1, 1};
  int64_t slabs = 1, rows = 1;
  int64_t slabs_per_outer = 1;  // consecutive slabs that share one bias
};

struct SlabIndex {
  int64_t at[kMaxBatchDims];
};

TGA_DEVICE SlabIndex slab_index(const Batch& batch, int64_t slab) {
  SlabIndex index = {};
  TGA_UNROLL
  for (int d = kMaxBatchDims - 1; d > 0; --d) {
    if (batch.slab_sizes[d] > 1) {
      index.at[d] = slab % batch.slab_sizes[d];
      slab /= batch.slab_sizes[d];
    }
  }
  index.at[0] = slab;
  return index;
}

// Strides count elements; the last dimension of every operand but bias, mask and gate is contiguous.
struct Operand {
  void* data = nullptr;
  int64_t slab[kMaxBatchDims] = {};
  int64_t batch_row = 0, head = 0, row = 0, col = 0;

  TGA_DEVICE int64_t offset(const SlabIndex& index, int64_t batch_row_index, int64_t head_index) const {
    int64_t sum = batch_row_index * batch_row + head_index * head;
    TGA_UNROLL
    for (int d = 0; d < kMaxBatchDims; ++d) {
      sum += index.at[d] * slab[d];
    }
    return sum;
  }
};

// What forward and backward share.
struct AttentionParams {
  Operand query, key, value, gate, bias, mask, out, lse, row_max, row_sum, key_lengths;
  Batch batch;
  int64_t first_block = 0;
  int heads = 0, kv_heads = 0, q_len = 0, k_len = 0, head_dim = 0, value_dim = 0;
  int window = 0;  // at most k_len
  float scale = 1;
  bool mean_rows = false;
  bool is_causal = false;
  bool bias_is_float = false;  // read by kGeneral only
  bool aligned = false;        // 16-byte copies are allowed; read by kGeneral only
};

// What the kernels of the backward know besides. Everything but the gradients is scratch, written by the prepare kernels:
//
//   core_grad  [slabs, rows, H, q_padded, head_dim]   dO = grad_out * sigmoid(gate), zeros past the ends
//   row_terms  [slabs, rows, H, q_padded / 2, 8]      per pair of queries: -delta twice {a, b, a, b}, then the
//              shifts {a, b} and 1 where the row is low, else 0
//   bias_t     [outer, bias heads, key tile, query tile, fragment]   the bias as fragments of the transposed scores; not
//   for
//              float32 operands, whose kernels read the bias itself
//   partial    [parts, outer, H, query tile, key tile, fragment]     sums of dBias over some of the batch rows, float32
//
// head_dim is the compiled width. A row's probability is 2^(logit - shift), shift being +inf for rows that attend nothing
// and for rows past the end.
struct BackwardParams : AttentionParams {
  Operand grad_out, grad_lse, d_query, d_key, d_value, d_gate, d_bias;
  void* core_grad = nullptr;
  float* row_terms = nullptr;
  void* bias_t = nullptr;
  float* partial = nullptr;
  int q_padded = 0, k_padded = 0;          // multiples of kPadding
  int64_t rows_per_chunk = 1, chunks = 1;  // batch rows that one block walks, and pieces of a slab that makes
  bool d_gate_is_float = false, d_bias_is_float = false;
  bool grad_pairs_aligned = false;
  bool d_bias_direct = false;  // one part and nothing to sum: blocks store dBias themselves
};

// Arguments of copy_bias.cuh: the bias, and where its copy goes.
struct CopyBiasParams {
  Operand from;
  void* to = nullptr;
  int64_t slab_sizes[kMaxBatchDims] = {};
  int64_t row_length = 0;  // of the copy: k_len, padded
  int64_t first_block = 0;
  int heads = 0, q_len = 0, k_len = 0;
};

// Arguments of the kernels for float32 and float64. Scratch of the backward:
//
//   row_terms  [slabs, rows, H, Q, 3]    shift (+inf: the row attends nothing), 1 / sum, delta
//   core_grad  [slabs, rows, H, Q, Dv]   dO = grad_out * sigmoid(gate)
template <class T>
struct PlainParams : AttentionParams {
  Operand grad_out, grad_lse, d_query, d_key, d_value, d_gate, d_bias;
  T* row_terms = nullptr;
  T* core_grad = nullptr;
  double exact_scale = 1;
};

// Scratch rows are padded to the largest tile, so that tiles need no bounds in it.
constexpr int kPadding = 128;

}  // namespace torch_gated_attn::cuda
