// SPDX-License-Identifier: BSD-3-Clause
//
// The arguments of a call, once: the text of the schemas, the struct that everything below the dispatcher takes, and the
// way from one to the other. A new argument is appended to each of the three, with a default, and to the kernels that use
// it. Their meaning stands in gated_attention.h.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

#include "gated_attention.h"

namespace torch_gated_attn {

struct Arguments {
  at::Tensor query, key, value;
  OptionalTensor gate, bias, mask;
  std::optional<double> scale;
  c10::string_view masked_rows = "zero";
  bool is_causal = false;
  std::optional<int64_t> window;
  OptionalTensor key_lengths;
};

// What a backward needs besides: what flows in, what the forward left, and which gradients are wanted (query, key, value,
// gate, bias).
struct BackwardArguments : Arguments {
  OptionalTensor grad_out, grad_lse;
  at::Tensor out, row_max, row_sum;
  std::array<bool, 5> grad_mask = {};
};

// of the public ops
constexpr const char* kPublicSchema =
    "(Tensor query, Tensor key, Tensor value, Tensor? gate=None, Tensor? bias=None, Tensor? mask=None, *, "
    "float? scale=None, str masked_rows=\"zero\", bool is_causal=False, int? window=None, Tensor? key_lengths=None)";
constexpr const char* kForwardSchema =
    "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? bias, Tensor? mask, float? scale, str masked_rows, "
    "bool is_causal=False, int? window=None, Tensor? key_lengths=None)";
constexpr const char* kBackwardSchema =
    "(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? bias, Tensor? "
    "mask, "
    "Tensor out, Tensor row_max, Tensor row_sum, float? scale, str masked_rows, bool[5] grad_mask, bool is_causal=False, "
    "int? window=None, Tensor? key_lengths=None)";

// f(arguments in the order of kPublicSchema and kForwardSchema), and of kBackwardSchema.
template <class F>
decltype(auto) unpack(const Arguments& a, const F& f) {
  return f(a.query, a.key, a.value, a.gate, a.bias, a.mask, a.scale, a.masked_rows, a.is_causal, a.window, a.key_lengths);
}
template <class F>
decltype(auto) unpack(const BackwardArguments& a, const F& f) {
  return f(a.grad_out, a.grad_lse, a.query, a.key, a.value, a.gate, a.bias, a.mask, a.out, a.row_max, a.row_sum, a.scale,
           a.masked_rows, a.grad_mask, a.is_causal, a.window, a.key_lengths);
}

// Packed<f>::call: a function of Arguments or of BackwardArguments as the dispatcher calls it.
template <auto kFunction>
struct Packed;
template <class Result, Result (*kFunction)(const Arguments&)>
struct Packed<kFunction> {
  static Result call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                     const OptionalTensor& bias, const OptionalTensor& mask, std::optional<double> scale,
                     c10::string_view masked_rows, bool is_causal, std::optional<int64_t> window,
                     const OptionalTensor& key_lengths) {
    return kFunction({query, key, value, gate, bias, mask, scale, masked_rows, is_causal, window, key_lengths});
  }
};
template <class Result, Result (*kFunction)(const BackwardArguments&)>
struct Packed<kFunction> {
  static Result call(const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
                     const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate, const OptionalTensor& bias,
                     const OptionalTensor& mask, const at::Tensor& out, const at::Tensor& row_max,
                     const at::Tensor& row_sum, std::optional<double> scale, c10::string_view masked_rows,
                     std::array<bool, 5> grad_mask, bool is_causal, std::optional<int64_t> window,
                     const OptionalTensor& key_lengths) {
    return kFunction({{query, key, value, gate, bias, mask, scale, masked_rows, is_causal, window, key_lengths},
                      grad_out,
                      grad_lse,
                      out,
                      row_max,
                      row_sum,
                      grad_mask});
  }
};

// Calls an op by name through the dispatcher; f's Packed signature is the op's.
template <auto kFunction, class SomeArguments>
auto dispatch(const char* name, const SomeArguments& a) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<decltype(Packed<kFunction>::call)>();
  return unpack(a, [](const auto&... each) { return op.call(each...); });
}

// The functional ops, through the dispatcher.
ForwardResult forward(const Arguments& a);
Gradients backward(const BackwardArguments& a);

// The same two as differentiable ATen formulas of any order (double backward, torch.func, forward-mode AD); they allocate
// [*, H, Q, K].
ForwardResult forward_composite(const Arguments& a);
Gradients backward_composite(const BackwardArguments& a);

}  // namespace torch_gated_attn
