// SPDX-License-Identifier: BSD-3-Clause
//
// The tensors a call returns: dtype, shape and memory order, once for the Meta kernels (S = c10::SymInt) and the device
// launchers (S = int64_t), so that a traced graph and the kernel that runs it agree on every stride.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_permuted.h>
#include <c10/util/DimVector.h>

#include <algorithm>

#include "arguments.h"
#include "symbolic.h"

namespace torch_gated_attn {

template <typename S>
using Sizes = c10::SmallVector<S, 6>;

// An optional tensor that C++ code passes may also hold an undefined one; both mean "absent".
inline bool given(const OptionalTensor& tensor) { return tensor && tensor->defined(); }

// The type of lse, row_max and row_sum, and of every sum inside.
inline at::ScalarType accumulation_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// [*, H, Q, last]: query's shape with another last dimension.
template <typename S>
Sizes<S> query_sizes(const at::Tensor& query, const S& last) {
  const auto sizes = at::symint::sizes<S>(query);
  Sizes<S> result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

// [*, H, Q]
template <typename S>
Sizes<S> row_sizes(const at::Tensor& query) {
  const auto sizes = at::symint::sizes<S>(query);
  return Sizes<S>(sizes.begin(), sizes.end() - 1);
}

// The dimensions of `tensor` from outermost to innermost in memory. Those of size 1 keep their place, because their stride
// says nothing; ties keep their order; an expanded tensor (stride 0) has no order of its own and counts as contiguous.
template <typename S>
at::DimVector memory_order(const at::Tensor& tensor) {
  const auto sizes = at::symint::sizes<S>(tensor);
  const auto strides = at::symint::strides<S>(tensor);
  at::DimVector order, places;
  bool expanded = false;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    order.push_back(d);
    if (known_equal(sizes[d], S(1))) continue;
    expanded = expanded || known_equal(strides[d], S(0));
    places.push_back(d);
  }
  if (expanded) return order;
  // Insertion sort: it stays well defined where a comparison of traced strides has no answer yet.
  at::DimVector sorted;
  for (const int64_t d : places) {
    auto at = sorted.end();
    while (at != sorted.begin() && known_less(strides[*(at - 1)], strides[d])) --at;
    sorted.insert(at, d);
  }
  for (size_t i = 0; i < places.size(); ++i) order[places[i]] = sorted[i];
  return order;
}

// A dense tensor of `sizes` whose dimensions lie in memory as those of `like` do.
template <typename S>
at::Tensor empty_in_order_of(const at::Tensor& like, c10::ArrayRef<S> sizes) {
  const auto order = memory_order<S>(like);
  const auto options = at::TensorOptions().dtype(like.scalar_type()).device(like.device());
  if (std::is_sorted(order.begin(), order.end())) return at::symint::empty<S>(sizes, options);
  return at::symint::empty_permuted<S>(sizes, order, options);
}

// out [*, H, Q, Dv] in query's memory order; lse, row_max and row_sum [*, H, Q], contiguous.
template <typename S>
ForwardResult empty_forward(const Arguments& a) {
  auto out = empty_in_order_of<S>(a.query, query_sizes<S>(a.query, at::symint::size<S>(a.value, -1)));
  const auto options = at::TensorOptions().dtype(accumulation_type(a.query.scalar_type())).device(a.query.device());
  const auto row = [&] { return at::symint::empty<S>(row_sizes<S>(a.query), options); };
  return {std::move(out), row(), row(), row()};
}

// Gradients have the shape and dtype of their input: in its memory order, but contiguous for the bias, whose gradient is
// summed from contiguous blocks. Those nobody asked for, or of an absent input, are undefined.
template <typename S>
Gradients empty_gradients(const BackwardArguments& a) {
  const auto like = [](bool wanted, const at::Tensor& input) {
    return wanted ? empty_in_order_of<S>(input, at::symint::sizes<S>(input)) : at::Tensor();
  };
  at::Tensor d_gate, d_bias;
  if (given(a.gate)) d_gate = like(a.grad_mask[3], *a.gate);
  if (given(a.bias) && a.grad_mask[4]) {
    d_bias = at::symint::empty<S>(at::symint::sizes<S>(*a.bias),
                                  at::TensorOptions().dtype(a.bias->scalar_type()).device(a.bias->device()));
  }
  return {like(a.grad_mask[0], a.query), like(a.grad_mask[1], a.key), like(a.grad_mask[2], a.value), d_gate, d_bias};
}

// Both gradients of gate_output, each like its input.
template <typename S>
std::tuple<at::Tensor, at::Tensor> empty_gate_gradients(const at::Tensor& out, const at::Tensor& gate,
                                                        std::array<bool, 2> grad_mask) {
  const auto like = [](bool wanted, const at::Tensor& input) {
    return wanted ? empty_in_order_of<S>(input, at::symint::sizes<S>(input)) : at::Tensor();
  };
  return {like(grad_mask[0], out), like(grad_mask[1], gate)};
}

}  // namespace torch_gated_attn
