// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels of one instruction set: included by its .cpp after the target pragma, inside its namespace.

#include "simd.h"
#include "element.h"
#include "vector_math.h"
#include "scratch.h"
#include "micro.h"
#include "operands.h"
#include "lanes.h"
#include "prefetch.h"
#include "table.h"
#include "attended.h"
#include "forward_block.h"
#include "backward_block.h"
#include "pairs.h"
#include "keys.h"
#include "forward_unit.h"
#include "backward_unit.h"
#include "tiny_rows.h"
#include "few_queries_forward.h"
#include "few_queries_backward.h"
#include "parts.h"
#include "gate_output.h"

// Two vectors of queries per sub-block; one where the call has no more queries than that.
template <class A, class F>
static inline auto with_block(const Problem& p, F f) {
  if (p.heads / p.kv_heads * p.q_len <= kLanes<A>) return f(std::integral_constant<int, 1>{});
  return f(std::integral_constant<int, 2>{});
}
template <class F>
static inline auto with_elements(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{}, double{});
    case DType::kBFloat16: return f(BFloat16{}, float{});
    case DType::kFloat16: return f(Float16{}, float{});
    default: return f(float{}, float{});
  }
}
template <class F>
static inline auto with_types(const Problem& p, F f) {
  return with_elements(p.dtype, [&](auto element, auto arithmetic) {
    return with_block<decltype(arithmetic)>(p, [&](auto block) { return f(element, arithmetic, block); });
  });
}

static int block(const Problem& p) {
  return with_types(p, [](auto, auto a, auto nq) { return kLanes<decltype(a)> * nq.value; });
}

// f(kernel of the call's types, made on the scratch memory of `c`).
template <class F>
static inline void with_forward(const Problem& p, int max_lanes, Carver& c, F f) {
  with_types(p, [&](auto t, auto a, auto nq) {
    if (has_few_queries(p))
      f(FewQueriesForward<decltype(t), decltype(a)>(p, c));
    else
      f(ForwardUnit<decltype(t), decltype(a), nq.value>(p, max_lanes, c));
  });
}
template <class F>
static inline void with_backward(const Problem& p, int max_lanes, int64_t rows, Carver& c, F f) {
  with_types(p, [&](auto t, auto a, auto nq) {
    if (has_few_queries(p))
      f(FewQueriesBackward<decltype(t), decltype(a)>(p, c));
    else
      f(BackwardUnit<decltype(t), decltype(a), nq.value>(p, max_lanes, rows, c));
  });
}

static int64_t forward_scratch(const Problem& p, int max_lanes) {
  Carver c(nullptr);
  with_forward(p, max_lanes, c, [](const auto&) {});
  return c.used();
}
static void forward(const Problem& p, const ForwardUnitOfWork& work, int max_lanes, char* scratch) {
  Carver c(scratch);
  with_forward(p, max_lanes, c, [&](auto&& kernel) { kernel.run(work); });
}
static int64_t forward_state(const Problem& p, int max_lanes) {
  Carver c(nullptr);
  int64_t bytes = 0;
  with_forward(p, max_lanes, c, [&](const auto& kernel) { bytes = kernel.state_bytes(); });
  return bytes;
}
static void forward_merge(const Problem& p, const ForwardUnitOfWork& work, int max_lanes, int64_t parts, int64_t stride,
                          char* scratch) {
  Carver c(scratch);
  with_forward(p, max_lanes, c, [&](auto&& kernel) { kernel.merge(work, parts, stride); });
}
static int64_t backward_scratch(const Problem& p, int max_lanes, int64_t rows) {
  Carver c(nullptr);
  with_backward(p, max_lanes, rows, c, [](const auto&) {});
  return c.used();
}
static void backward(const Problem& p, const BackwardUnitOfWork& work, int max_lanes, int64_t rows, char* scratch) {
  Carver c(scratch);
  with_backward(p, max_lanes, rows, c, [&](auto&& kernel) { kernel.run(work); });
}
static void backward_merge(const Problem& p, const BackwardUnitOfWork& work, int64_t parts, int64_t k_stride,
                           int64_t v_stride) {
  with_elements(p.dtype, [&](auto t, auto a) {
    for (int64_t r = work.row_begin; r < work.row_end; ++r) {
      const Offsets batch(p, work.outer * p.rows + r);
      sum_parts<decltype(a)>(work.d_key, r - work.row_begin, parts, k_stride, p.k_len, p.head_dim,
                             at<decltype(t)>(p.d_key, batch.d_key, work.kv_head), p.d_key);
      sum_parts<decltype(a)>(work.d_value, r - work.row_begin, parts, v_stride, p.k_len, p.value_dim,
                             at<decltype(t)>(p.d_value, batch.d_value, work.kv_head), p.d_value);
    }
  });
}
static void gate_output(DType dtype, char* const* data, const int64_t* strides, int64_t n) {
  with_elements(dtype, [&](auto t, auto a) { gate_elements<decltype(t), decltype(a)>(data, strides, n); });
}
static void gate_output_backward(DType dtype, char* const* data, const int64_t* strides, int64_t n) {
  with_elements(dtype, [&](auto t, auto a) { gate_gradients<decltype(t), decltype(a)>(data, strides, n); });
}
