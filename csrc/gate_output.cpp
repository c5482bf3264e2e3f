// SPDX-License-Identifier: BSD-3-Clause
//
// gate_output as ATen formulas, which run on any device without a kernel of its own and which PyTorch can differentiate any
// number of times; and its autograd. Sums and sigmoids are in the accumulation type, results are rounded once.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "recording.h"

namespace torch_gated_attn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using GateGradients = std::tuple<at::Tensor, at::Tensor>;

at::Tensor formula(const at::Tensor& out, const at::Tensor& gate) {
  const auto type = accumulation_type(out.scalar_type());
  return (out.to(type) * gate.to(type).sigmoid()).to(out.scalar_type());
}

GateGradients gradient_formula(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& gate,
                               std::array<bool, 2> grad_mask) {
  const auto type = accumulation_type(out.scalar_type());
  const auto wide_grad = grad.to(type), g = gate.to(type).sigmoid();
  GateGradients result;
  auto& [d_out, d_gate] = result;
  if (grad_mask[0]) d_out = (wide_grad * g).to(out.scalar_type());
  // sigmoid(-x) is 1 - sigmoid(x) without cancellation
  if (grad_mask[1])
    d_gate =
        at::sum_to(wide_grad * out.to(type) * (g * (-gate.to(type)).sigmoid()), gate.sym_sizes()).to(gate.scalar_type());
  return result;
}

at::Tensor gate_output_any_device(const at::Tensor& out, const at::Tensor& gate) {
  check_gate_output<int64_t>(out, gate);
  return empty_in_order_of<int64_t>(out, out.sizes()).copy_(formula(out, gate));
}

GateGradients gate_output_backward_any_device(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& gate,
                                              std::array<bool, 2> grad_mask) {
  check_gate_output_backward<int64_t>(grad, out, gate);
  auto result = empty_gate_gradients<int64_t>(out, gate, grad_mask);
  const auto [d_out, d_gate] = gradient_formula(grad, out, gate, grad_mask);
  if (grad_mask[0]) std::get<0>(result).copy_(d_out);
  if (grad_mask[1]) std::get<1>(result).copy_(d_gate);
  return result;
}

class GateOutput : public torch::autograd::Function<GateOutput> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& out, const at::Tensor& gate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({out, gate});
    return gate_output(out, gate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [d_out, d_gate] =
        gate_output_backward(grads[0], saved[0], saved[1], {ctx->needs_input_grad(0), ctx->needs_input_grad(1)});
    return {d_out, d_gate};
  }
};

at::Tensor gate_output_autograd(const at::Tensor& out, const at::Tensor& gate) {
  if (needs_composite(out, gate)) {
    check_gate_output<c10::SymInt>(out, gate);
    return formula(out, gate);
  }
  if (recorded(out, gate)) return GateOutput::apply(out, gate);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return gate_output(out, gate);
}

GateGradients gate_output_backward_autograd(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& gate,
                                            std::array<bool, 2> grad_mask) {
  if (needs_composite(grad, out, gate) || recorded(grad, out, gate)) {
    check_gate_output_backward<c10::SymInt>(grad, out, gate);
    return gradient_formula(grad, out, gate, grad_mask);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return gate_output_backward(grad, out, gate, grad_mask);
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, CompositeExplicitAutograd, m) {
  m.impl("gate_output", TORCH_FN(torch_gated_attn::gate_output_any_device));
  m.impl("_gate_output_backward", TORCH_FN(torch_gated_attn::gate_output_backward_any_device));
}

TORCH_LIBRARY_IMPL(torch_gated_attn, Autograd, m) {
  m.impl("gate_output", TORCH_FN(torch_gated_attn::gate_output_autograd));
  m.impl("_gate_output_backward", TORCH_FN(torch_gated_attn::gate_output_backward_autograd));
}
