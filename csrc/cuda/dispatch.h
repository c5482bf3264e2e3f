// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <stdexcept>
#include <type_traits>

#include "tiles.h"

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

// Calls f with the compile-time type and head_dim of a tensor-core choice.
template <class F>
void dispatch_tensor_core(DType type, int head_dim, F f) {
  dispatch_head_dim(head_dim, [&](auto dim) {
    if (type == DType::kFloat32) {
      if constexpr (dim.value <= kMaxTf32HeadDim) {
        f(std::integral_constant<DType, DType::kFloat32>(), dim);
      } else {
        throw std::logic_error("no float32 kernel is compiled for this head_dim");
      }
    } else if (type == DType::kBFloat16) {
      f(std::integral_constant<DType, DType::kBFloat16>(), dim);
    } else {
      f(std::integral_constant<DType, DType::kFloat16>(), dim);
    }
  });
}

// Calls f with the compile-time access to the bias, of those that kernels of a type have.
template <DType kType, class F>
auto with_access(BiasAccess access, F f) {
  const bool has_bias = access != BiasAccess::kNone;
  if constexpr (kType == DType::kFloat32) {
    return has_bias ? f(std::integral_constant<BiasAccess, BiasAccess::kFloat>())
                    : f(std::integral_constant<BiasAccess, BiasAccess::kNone>());
  } else {
    switch (access) {
      case BiasAccess::kNone: return f(std::integral_constant<BiasAccess, BiasAccess::kNone>());
      case BiasAccess::kHalf: return f(std::integral_constant<BiasAccess, BiasAccess::kHalf>());
      case BiasAccess::kFloat: return f(std::integral_constant<BiasAccess, BiasAccess::kFloat>());
      default: return f(std::integral_constant<BiasAccess, BiasAccess::kGeneral>());
    }
  }
}

}  // namespace torch_gated_attn::cuda
