// SPDX-License-Identifier: BSD-3-Clause
//
// What visibility.h says as boolean tensors, True = hidden, for what has no kernel that skips: the composite formula and
// PyTorch's attention. Sizes are read as symbols.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>

#include "arguments.h"

namespace torch_gated_attn {

inline at::Tensor positions(const c10::SymInt& begin, const c10::SymInt& end, const at::Tensor& like) {
  return at::arange(at::Scalar(begin), at::Scalar(end), at::TensorOptions().dtype(at::kLong).device(like.device()));
}

// [Q, K]: keys behind a query's position, or before its window. For causal calls.
inline at::Tensor hidden_by_position(const Arguments& a) {
  const auto queries = a.query.sym_size(-2), keys = a.key.sym_size(-2);
  const auto key = positions(0, keys, a.query), query = positions(keys - queries, keys, a.query).unsqueeze(-1);
  const auto behind = key > query;
  return a.window ? behind.logical_or(key <= query - *a.window) : behind;
}

// [*, 1, 1, K]: keys that do not exist. For calls with key_lengths.
inline at::Tensor beyond_lengths(const Arguments& a) {
  const auto length = a.key_lengths->unsqueeze(-1).unsqueeze(-1).unsqueeze(-1);
  return positions(0, a.key.sym_size(-2), a.query) >= length;
}

}  // namespace torch_gated_attn
