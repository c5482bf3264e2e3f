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
ForwardResult forward_autocast(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                               std::optional<double> scale, c10::string_view masked_rows) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  if (query.scalar_type() == at::kDouble) return forward(query, key, value, gate, bias, mask, scale, masked_rows);
  const auto target = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  const auto cast = [&](const auto& tensor) { return at::autocast::cached_cast(target, tensor, kDevice); };
  OptionalTensor low_bias = bias;
  if (given(bias) && bias->scalar_type() == at::kDouble) low_bias = bias->to(at::kFloat);
  if (given(bias) && c10::isReducedFloatingType(bias->scalar_type())) low_bias = cast(bias);
  return forward(cast(query), cast(key), cast(value), cast(gate), low_bias, mask, scale, masked_rows);
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
  m.impl("_gated_attention_forward", TORCH_FN((forward_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>)));
  m.impl("gate_output", TORCH_FN((gate_output_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>)));
}

TORCH_LIBRARY_IMPL(torch_gated_attn, AutocastCUDA, m) {
  using namespace torch_gated_attn;
  m.impl("_gated_attention_forward", TORCH_FN((forward_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>)));
  m.impl("gate_output", TORCH_FN((gate_output_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>)));
}
