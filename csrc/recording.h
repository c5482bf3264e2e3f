// SPDX-License-Identifier: BSD-3-Clause
//
// Which way a call is differentiated, asked by the Autograd kernels.
#pragma once

#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "outputs.h"

namespace torch_gated_attn {

inline bool in_functorch_transform() {
  using c10::DispatchKey;
  return c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerBackMode);
}

inline bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }
inline bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool requires_grad(const OptionalTensor& tensor) { return tensor && requires_grad(*tensor); }

// Where a torch::autograd::Function cannot follow.
template <class... Tensors>
bool needs_composite(const Tensors&... tensors) {
  return in_functorch_transform() || (has_tangent(tensors) || ...);
}

template <class... Tensors>
bool recorded(const Tensors&... tensors) {
  return c10::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

}  // namespace torch_gated_attn
