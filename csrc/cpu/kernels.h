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
};
// All queries of a key/value head, `max_lanes` at a time.
struct BackwardUnitOfWork {
  int64_t outer, kv_head, row_begin, row_end;
  int64_t partial;  // which slice of d_bias, in elements from d_bias.data
};

struct CpuKernels {
  const char* name;
  int (*block)(const Problem&);  // lanes of a sub-block; max_lanes is a multiple of it
  // max_lanes: queries of a super-block, at most kMaxLanes of lanes.h
  int64_t (*forward_scratch)(const Problem&, int max_lanes);
  void (*forward)(const Problem&, const ForwardUnitOfWork&, int max_lanes, char* scratch);
  int64_t (*backward_scratch)(const Problem&, int max_lanes, int64_t rows);
  void (*backward)(const Problem&, const BackwardUnitOfWork&, int max_lanes, int64_t rows, char* scratch);
  // gate_output.h; data and byte strides of: result, out, gate - d_out, d_gate, grad, out, gate
  void (*gate_output)(DType, char* const* data, const int64_t* strides, int64_t n);
  void (*gate_output_backward)(DType, char* const* data, const int64_t* strides, int64_t n);
};

extern const CpuKernels kKernelsDefault, kKernelsAvx2, kKernelsAvx512, kKernelsAvx512Bf16;

}  // namespace torch_gated_attn
