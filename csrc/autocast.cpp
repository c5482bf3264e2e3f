// SPDX-License-Identifier: BSD-3-Clause
//
// Autocast: query, key, value and gate take the region's low precision; a float32 bias keeps its precision, because the
// kernels add it in float32 anyway. Float64 calls are left alone, as PyTorch's own ops leave them.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "outputs.h"

namespace torch_gated_attn {
namespace {

template <c10::DispatchKey kKey, c10::DeviceType kDevice>
ForwardResult forward_autocast(const Arguments& given_arguments) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  Arguments a = given_arguments;
  if (a.query.scalar_type() == at::kDouble) return forward(a);
  const auto target = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  const auto cast = [&](auto& tensor) { tensor = at::autocast::cached_cast(target, tensor, kDevice); };
  cast(a.query), cast(a.key), cast(a.value), cast(a.gate);
  if (given(a.bias) && a.bias->scalar_type() == at::kDouble) a.bias = a.bias->to(at::kFloat);
  if (given(a.bias) && c10::isReducedFloatingType(a.bias->scalar_type())) cast(a.bias);
  return forward(a);
}

template <c10::DispatchKey kKey, c10::DeviceType kDevice>
at::Tensor gate_output_autocast(const at::Tensor& out, const at::Tensor& gate) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  if (out.scalar_type() == at::kDouble) return gate_output(out, gate);
  const auto target = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  return gate_output(at::autocast::cached_cast(target, out, kDevice), at::autocast::cached_cast(target, gate, kDevice));
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, AutocastCPU, m) {
  using namespace torch_gated_attn;
  m.impl("_gated_attention_forward", TORCH_FN((Packed<forward_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>>::call)));
  m.impl("gate_output", TORCH_FN((gate_output_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>)));
}

TORCH_LIBRARY_IMPL(torch_gated_attn, AutocastCUDA, m) {
  using namespace torch_gated_attn;
  m.impl("_gated_attention_forward", TORCH_FN((Packed<forward_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>>::call)));
  m.impl("gate_output", TORCH_FN((gate_output_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>)));
}
