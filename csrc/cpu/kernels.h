// SPDX-License-Identifier: BSD-3-Clause
//
// What an instruction set exports: one table of functions. A unit of work touches results no other unit touches, except
// the slices of d_bias partials, which the launcher sums in a fixed order.
#pragma once

#include "../problem.h"

namespace torch_gated_attn {

// Queries are counted over the heads that share a key/value head: head_in_group * q_len + query.
struct ForwardUnitOfWork {
  int64_t outer, kv_head, first_query, end_query, row_begin, row_end;
  Range<int64_t> keys;
  char* state;  // null where `keys` are all keys; else what they add up to goes here, forward_state bytes for each row
};
// Queries of a key/value head, `max_lanes` at a time.
struct BackwardUnitOfWork {
  int64_t outer, kv_head, first_query, end_query, row_begin, row_end;
  int64_t partial;  // which slice of d_bias, in elements from d_bias.data
  // Null where these are all queries; else [row][K][head_dim] and [row][K][value_dim] in the accumulation type: what they
  // add to the gradients of key and value.
  char *d_key, *d_value;
};

struct CpuKernels {
  const char* name;
  int (*block)(const Problem&);  // lanes of a sub-block; max_lanes is a multiple of it
  // max_lanes: queries of a super-block, at most kMaxLanes of lanes.h
  int64_t (*forward_scratch)(const Problem&, int max_lanes);
  void (*forward)(const Problem&, const ForwardUnitOfWork&, int max_lanes, char* scratch);
  // Of units that share the keys between them: `parts` states, `stride` bytes apart, from work.state on give the results.
  int64_t (*forward_state)(const Problem&, int max_lanes);
  void (*forward_merge)(const Problem&, const ForwardUnitOfWork&, int max_lanes, int64_t parts, int64_t stride,
                        char* scratch);
  int64_t (*backward_scratch)(const Problem&, int max_lanes, int64_t rows);
  void (*backward)(const Problem&, const BackwardUnitOfWork&, int max_lanes, int64_t rows, char* scratch);
  // Of units that share the queries: sums `parts` of d_key and d_value, `k_stride` and `v_stride` bytes apart, into the
  // results.
  void (*backward_merge)(const Problem&, const BackwardUnitOfWork&, int64_t parts, int64_t k_stride, int64_t v_stride);
  // gate_output.h; data and byte strides of: result, out, gate - d_out, d_gate, grad, out, gate
  void (*gate_output)(DType, char* const* data, const int64_t* strides, int64_t n);
  void (*gate_output_backward)(DType, char* const* data, const int64_t* strides, int64_t n);
};

extern const CpuKernels kKernelsDefault;
extern const CpuKernels kKernelsAvx2, kKernelsAvx512, kKernelsAvx512Bf16;  // x86-64
extern const CpuKernels kKernelsNeon;                                      // aarch64

}  // namespace torch_gated_attn
