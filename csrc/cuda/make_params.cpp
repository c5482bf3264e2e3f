// SPDX-License-Identifier: BSD-3-Clause
#include "make_params.h"

#include <algorithm>

namespace torch_gated_attn::cuda {
namespace {

// Where the merged batch dimensions go: slab dimensions packed to the right, -1 for those of size 1.
struct Places {
  int slab_dim[kMaxBatchDims];
  int row_dim = -1;
};

Places place_batch_dims(const Problem& problem) {
  Places places;
  int next = kMaxBatchDims;
  for (int d = kMaxBatchDims - 1; d >= 0; --d) {
    places.slab_dim[d] = -1;
    if (problem.batch[d] == 1) {
      continue;
    }
    // The rows are innermost, so the first dimension met is one of theirs if there are any.
    if (problem.rows > 1 && places.row_dim < 0) {
      places.row_dim = d;
    } else {
      places.slab_dim[d] = --next;
    }
  }
  return places;
}

}  // namespace

Operand make_operand(const Problem& problem, const View& view) {
  const Places places = place_batch_dims(problem);
  Operand operand;
  operand.data = view.data;
  for (int d = 0; d < kMaxBatchDims; ++d) {
    if (places.slab_dim[d] >= 0) {
      operand.slab[places.slab_dim[d]] = view.batch[d];
    }
  }
  operand.batch_row = places.row_dim >= 0 ? view.batch[places.row_dim] : 0;
  operand.head = view.head;
  operand.row = view.row;
  operand.col = view.col;
  return operand;
}

AttentionParams make_params(const Problem& problem) {
  const Places places = place_batch_dims(problem);
  AttentionParams p;
  p.query = make_operand(problem, problem.query);
  p.key = make_operand(problem, problem.key);
  p.value = make_operand(problem, problem.value);
  p.gate = make_operand(problem, problem.gate);
  p.bias = make_operand(problem, problem.bias);
  p.mask = make_operand(problem, problem.mask);
  p.out = make_operand(problem, problem.out);
  p.lse = make_operand(problem, problem.lse);
  p.row_max = make_operand(problem, problem.row_max);
  p.row_sum = make_operand(problem, problem.row_sum);
  p.key_lengths = make_operand(problem, problem.key_lengths);
  for (int d = 0; d < kMaxBatchDims; ++d) {
    if (places.slab_dim[d] >= 0) {
      p.batch.slab_sizes[places.slab_dim[d]] = problem.batch[d];
    }
  }
  p.batch.rows = places.row_dim >= 0 ? problem.batch[places.row_dim] : 1;
  p.batch.slabs_per_outer = problem.rows / p.batch.rows;
  p.batch.slabs = problem.outer * p.batch.slabs_per_outer;
  p.heads = static_cast<int>(problem.heads);
  p.kv_heads = static_cast<int>(problem.kv_heads);
  p.q_len = static_cast<int>(problem.q_len);
  p.k_len = static_cast<int>(problem.k_len);
  p.head_dim = static_cast<int>(problem.head_dim);
  p.value_dim = static_cast<int>(problem.value_dim);
  p.scale = static_cast<float>(problem.scale);
  p.is_causal = problem.is_causal;
  p.window = static_cast<int>(std::min(problem.window, problem.k_len));
  p.mean_rows = problem.mean_rows && problem.k_len > 0;
  p.bias_is_float = problem.bias_dtype == DType::kFloat32;
  return p;
}

}  // namespace torch_gated_attn::cuda
