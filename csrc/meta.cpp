// SPDX-License-Identifier: BSD-3-Clause
//
// What a traced call returns: the checks and the allocation of the kernels, on sizes that may be symbols.
#include <torch/library.h>

#include "checks.h"

namespace torch_gated_attn {
namespace {

ForwardResult forward_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                           std::optional<double> /*scale*/, c10::string_view masked_rows) {
  check_forward<c10::SymInt>(query, key, value, gate, bias, mask, masked_rows);
  return empty_forward<c10::SymInt>(query, value);
}

Gradients backward_meta(const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
                        const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                        const OptionalTensor& bias, const OptionalTensor& mask, const at::Tensor& out,
                        const at::Tensor& row_max, const at::Tensor& row_sum, std::optional<double> /*scale*/,
                        c10::string_view masked_rows, std::array<bool, 5> grad_mask) {
  check_backward<c10::SymInt>(grad_out, grad_lse, query, key, value, gate, bias, mask, out, row_max, row_sum, masked_rows);
  return empty_gradients<c10::SymInt>(query, key, value, gate, bias, grad_mask);
}

at::Tensor gate_output_meta(const at::Tensor& out, const at::Tensor& gate) {
  check_gate_output<c10::SymInt>(out, gate);
  return empty_in_order_of<c10::SymInt>(out, out.sym_sizes());
}

std::tuple<at::Tensor, at::Tensor> gate_output_backward_meta(const at::Tensor& grad, const at::Tensor& out,
                                                             const at::Tensor& gate, std::array<bool, 2> grad_mask) {
  check_gate_output_backward<c10::SymInt>(grad, out, gate);
  return empty_gate_gradients<c10::SymInt>(out, gate, grad_mask);
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, Meta, m) {
  m.impl("_gated_attention_forward", TORCH_FN(torch_gated_attn::forward_meta));
  m.impl("_gated_attention_backward", TORCH_FN(torch_gated_attn::backward_meta));
  m.impl("gate_output", TORCH_FN(torch_gated_attn::gate_output_meta));
  m.impl("_gate_output_backward", TORCH_FN(torch_gated_attn::gate_output_backward_meta));
}
