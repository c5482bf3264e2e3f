// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <stdexcept>
#include <type_traits>

#include "../problem.h"

namespace torch_gated_attn::cuda {

// Calls f with the compile-time head_dim of a choice.
template <class F>
void dispatch_head_dim(int head_dim, F f) {
  switch (head_dim) {
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 48: return f(std::integral_constant<int, 48>());
    case 64: return f(std::integral_constant<int, 64>());
    case 96: return f(std::integral_constant<int, 96>());
    case 128: return f(std::integral_constant<int, 128>());
    default: throw std::logic_error("no kernel is compiled for this head_dim");
  }
}

// Calls f with the compile-time 16-bit type and head_dim of a tensor-core choice.
template <class F>
void dispatch_half(DType type, int head_dim, F f) {
  dispatch_head_dim(head_dim, [&](auto dim) {
    if (type == DType::kBFloat16) {
      f(std::integral_constant<DType, DType::kBFloat16>(), dim);
    } else {
      f(std::integral_constant<DType, DType::kFloat16>(), dim);
    }
  });
}

}  // namespace torch_gated_attn::cuda
