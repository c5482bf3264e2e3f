// SPDX-License-Identifier: BSD-3-Clause
//
// Autograd of the two functional ops, in C++ so that LibTorch and TorchScript train too. First derivatives take the fused
// backward; wherever a torch::autograd::Function cannot follow (torch.func transforms, forward-mode AD, a backward that is
// itself differentiated) the call becomes the composite formula.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "recording.h"

namespace torch_gated_attn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor or_undefined(const OptionalTensor& tensor) { return given(tensor) ? *tensor : at::Tensor(); }
OptionalTensor or_none(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

class GatedAttention : public torch::autograd::Function<GatedAttention> {
 public:
  static constexpr bool is_traceable = true;  // compiled autograd may trace the backward: it only calls the dispatcher

  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& gate, const OptionalTensor& bias,
                               const OptionalTensor& mask, std::optional<double> scale, c10::string_view masked_rows) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [out, lse, row_max, row_sum] = torch_gated_attn::forward(query, key, value, gate, bias, mask, scale, masked_rows);
    ctx->save_for_backward(
        {query, key, value, or_undefined(gate), or_undefined(bias), or_undefined(mask), out, row_max, row_sum});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["masked_rows"] = std::string(masked_rows);
    ctx->set_materialize_grads(false);
    return {out, lse, row_max, row_sum};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const size_t kInputs = 8;
    // row_max and row_sum are residuals: what flows into them has no meaning and no effect.
    const auto &grad_out = grads[0], &grad_lse = grads[1];
    if (!grad_out.defined() && !grad_lse.defined()) return variable_list(kInputs);
    const auto saved = ctx->get_saved_variables();
    const auto &gate = saved[3], &bias = saved[4];
    // needs_input_grad counts only the inputs that were tensors: query, key, value, then those of gate and bias given.
    size_t next = 3;
    const bool needs_gate = gate.defined() && ctx->needs_input_grad(next++);
    const bool needs_bias = bias.defined() && ctx->needs_input_grad(next);
    const std::array<bool, 5> grad_mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                           needs_gate, needs_bias};
    auto [d_query, d_key, d_value, d_gate, d_bias] = torch_gated_attn::backward(
        or_none(grad_out), or_none(grad_lse), saved[0], saved[1], saved[2], or_none(gate), or_none(bias), or_none(saved[5]),
        saved[6], saved[7], saved[8], ctx->saved_data["scale"].toOptional<double>(),
        ctx->saved_data["masked_rows"].toStringRef(), grad_mask);
    variable_list result = {d_query, d_key, d_value, d_gate, d_bias};
    result.resize(kInputs);
    return result;
  }
};

ForwardResult forward_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                               std::optional<double> scale, c10::string_view masked_rows) {
  if (needs_composite(query, key, value, gate, bias)) {
    check_forward<c10::SymInt>(query, key, value, gate, bias, mask, masked_rows);
    return forward_composite(query, key, value, gate, bias, mask, scale, masked_rows);
  }
  if (!recorded(query, key, value, gate, bias)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // a Function costs microseconds
    return forward(query, key, value, gate, bias, mask, scale, masked_rows);
  }
  const auto results = GatedAttention::apply(query, key, value, gate, bias, mask, scale, masked_rows);
  return {results[0], results[1], results[2], results[3]};
}

// Reached with grad mode on only while a backward is itself recorded (create_graph).
Gradients backward_autograd(const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
                            const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                            const OptionalTensor& bias, const OptionalTensor& mask, const at::Tensor& out,
                            const at::Tensor& row_max, const at::Tensor& row_sum, std::optional<double> scale,
                            c10::string_view masked_rows, std::array<bool, 5> grad_mask) {
  if (needs_composite(grad_out, grad_lse, query, key, value, gate, bias) ||
      recorded(grad_out, grad_lse, query, key, value, gate, bias)) {
    check_backward<c10::SymInt>(grad_out, grad_lse, query, key, value, gate, bias, mask, out, row_max, row_sum,
                                masked_rows);
    return backward_composite(grad_out, grad_lse, query, key, value, gate, bias, mask, scale, masked_rows, grad_mask);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward(grad_out, grad_lse, query, key, value, gate, bias, mask, out, row_max, row_sum, scale, masked_rows,
                  grad_mask);
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, Autograd, m) {
  m.impl("_gated_attention_forward", TORCH_FN(torch_gated_attn::forward_autograd));
  m.impl("_gated_attention_backward", TORCH_FN(torch_gated_attn::backward_autograd));
}
