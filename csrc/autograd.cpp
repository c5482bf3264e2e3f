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

  // The arguments one by one, as the schema has them: PyTorch looks for tensors among the arguments of this function.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& gate, const OptionalTensor& bias,
                               const OptionalTensor& mask, std::optional<double> scale, c10::string_view masked_rows,
                               bool is_causal, std::optional<int64_t> window, const OptionalTensor& key_lengths) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [out, lse, row_max, row_sum] = torch_gated_attn::forward(
        {query, key, value, gate, bias, mask, scale, masked_rows, is_causal, window, key_lengths});
    ctx->save_for_backward({query, key, value, or_undefined(gate), or_undefined(bias), or_undefined(mask),
                            or_undefined(key_lengths), out, row_max, row_sum});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["masked_rows"] = std::string(masked_rows);
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["window"] = window;
    ctx->set_materialize_grads(false);
    return {out, lse, row_max, row_sum};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const size_t kInputs = 11;
    // row_max and row_sum are residuals: what flows into them has no meaning and no effect.
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kInputs);
    const auto saved = ctx->get_saved_variables();
    BackwardArguments a;
    a.query = saved[0], a.key = saved[1], a.value = saved[2];
    a.gate = or_none(saved[3]), a.bias = or_none(saved[4]), a.mask = or_none(saved[5]), a.key_lengths = or_none(saved[6]);
    a.out = saved[7], a.row_max = saved[8], a.row_sum = saved[9];
    a.grad_out = or_none(grads[0]), a.grad_lse = or_none(grads[1]);
    a.scale = ctx->saved_data["scale"].toOptional<double>();
    const std::string masked_rows = ctx->saved_data["masked_rows"].toStringRef();
    a.masked_rows = masked_rows;
    a.is_causal = ctx->saved_data["is_causal"].toBool();
    a.window = ctx->saved_data["window"].toOptional<int64_t>();
    // needs_input_grad counts only the inputs that were tensors: query, key, value, then those of gate and bias given.
    size_t next = 3;
    const bool needs_gate = a.gate && ctx->needs_input_grad(next++);
    const bool needs_bias = a.bias && ctx->needs_input_grad(next);
    a.grad_mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2), needs_gate, needs_bias};
    auto [d_query, d_key, d_value, d_gate, d_bias] = torch_gated_attn::backward(a);
    variable_list result = {d_query, d_key, d_value, d_gate, d_bias};
    result.resize(kInputs);
    return result;
  }
};

ForwardResult forward_autograd(const Arguments& a) {
  if (needs_composite(a.query, a.key, a.value, a.gate, a.bias)) {
    check_forward<c10::SymInt>(a);
    return forward_composite(a);
  }
  if (!recorded(a.query, a.key, a.value, a.gate, a.bias)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // a Function costs microseconds
    return forward(a);
  }
  const auto results = unpack(a, [](const auto&... each) { return GatedAttention::apply(each...); });
  return {results[0], results[1], results[2], results[3]};
}

// Reached with grad mode on only while a backward is itself recorded (create_graph).
Gradients backward_autograd(const BackwardArguments& a) {
  if (needs_composite(a.grad_out, a.grad_lse, a.query, a.key, a.value, a.gate, a.bias, a.out) ||
      recorded(a.grad_out, a.grad_lse, a.query, a.key, a.value, a.gate, a.bias, a.out)) {
    check_backward<c10::SymInt>(a);
    return backward_composite(a);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward(a);
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, Autograd, m) {
  using namespace torch_gated_attn;
  m.impl("_gated_attention_forward", TORCH_FN(Packed<forward_autograd>::call));
  m.impl("_gated_attention_backward", TORCH_FN(Packed<backward_autograd>::call));
}
