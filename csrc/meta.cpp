// SPDX-License-Identifier: BSD-3-Clause
//
// What a traced call returns: the checks and the allocation of the kernels, on sizes that may be symbols.
#include <torch/library.h>

#include "checks.h"

namespace torch_gated_attn {
namespace {

ForwardResult forward_meta(const Arguments& a) {
  check_forward<c10::SymInt>(a);
  return empty_forward<c10::SymInt>(a);
}

Gradients backward_meta(const BackwardArguments& a) {
  check_backward<c10::SymInt>(a);
  return empty_gradients<c10::SymInt>(a);
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
  using namespace torch_gated_attn;
  m.impl("_gated_attention_forward", TORCH_FN(Packed<forward_meta>::call));
  m.impl("_gated_attention_backward", TORCH_FN(Packed<backward_meta>::call));
  m.impl("gate_output", TORCH_FN(gate_output_meta));
  m.impl("_gate_output_backward", TORCH_FN(gate_output_backward_meta));
}
