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
#include "few_queries.h"
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
static int64_t forward_scratch(const Problem& p, int max_lanes) {
  Carver c(nullptr);
  with_types(p, [&](auto t, auto a, auto nq) {
    if (has_few_queries(p))
      FewQueriesForward<decltype(t), decltype(a)>(p, c);
    else
      ForwardUnit<decltype(t), decltype(a), nq.value>(p, max_lanes, c);
  });
  return c.used();
}
static void forward(const Problem& p, const ForwardUnitOfWork& work, int max_lanes, char* scratch) {
  Carver c(scratch);
  with_types(p, [&](auto t, auto a, auto nq) {
    if (has_few_queries(p))
      FewQueriesForward<decltype(t), decltype(a)>(p, c).run(work);
    else
      ForwardUnit<decltype(t), decltype(a), nq.value>(p, max_lanes, c).run(work);
  });
}
static int64_t backward_scratch(const Problem& p, int max_lanes, int64_t rows) {
  Carver c(nullptr);
  with_types(p, [&](auto t, auto a, auto nq) {
    if (has_few_queries(p))
      FewQueriesBackward<decltype(t), decltype(a)>(p, c);
    else
      BackwardUnit<decltype(t), decltype(a), nq.value>(p, max_lanes, rows, c);
  });
  return c.used();
}
static void backward(const Problem& p, const BackwardUnitOfWork& work, int max_lanes, int64_t rows, char* scratch) {
  Carver c(scratch);
  with_types(p, [&](auto t, auto a, auto nq) {
    if (has_few_queries(p))
      FewQueriesBackward<decltype(t), decltype(a)>(p, c).run(work);
    else
      BackwardUnit<decltype(t), decltype(a), nq.value>(p, max_lanes, rows, c).run(work);
  });
}
static void gate_output(DType dtype, char* const* data, const int64_t* strides, int64_t n) {
  with_elements(dtype, [&](auto t, auto a) { gate_elements<decltype(t), decltype(a)>(data, strides, n); });
}
static void gate_output_backward(DType dtype, char* const* data, const int64_t* strides, int64_t n) {
  with_elements(dtype, [&](auto t, auto a) { gate_gradients<decltype(t), decltype(a)>(data, strides, n); });
}
