// SPDX-License-Identifier: BSD-3-Clause
//
// Schemas, the calls into the dispatcher, and the public ops over the functional ones. Schemas are append-only: exported
// programs hold them all.
#include "gated_attention.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace torch_gated_attn {
namespace {

// The fused op refuses tensors that have no strided dense memory; what it needs beyond that, its kernels check.
ForwardResult attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                     const OptionalTensor& bias, const OptionalTensor& mask, std::optional<double> scale,
                     c10::string_view masked_rows) {
  check_strided("query", query);
  check_strided("key", key);
  check_strided("value", value);
  if (given(gate)) check_strided("gate", *gate);
  if (given(bias)) check_strided("bias", *bias);
  if (given(mask)) check_strided("mask", *mask);
  return forward(query, key, value, gate, bias, mask, scale, masked_rows);
}

at::Tensor gated_attention_implicit(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                    const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                                    std::optional<double> scale, c10::string_view masked_rows) {
  return std::get<0>(attend(query, key, value, gate, bias, mask, scale, masked_rows));
}

std::tuple<at::Tensor, at::Tensor> gated_attention_with_lse_implicit(const at::Tensor& query, const at::Tensor& key,
                                                                     const at::Tensor& value, const OptionalTensor& gate,
                                                                     const OptionalTensor& bias, const OptionalTensor& mask,
                                                                     std::optional<double> scale,
                                                                     c10::string_view masked_rows) {
  auto [out, lse, row_max, row_sum] = attend(query, key, value, gate, bias, mask, scale, masked_rows);
  return {std::move(out), std::move(lse)};
}

template <class Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

at::Tensor gated_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                           std::optional<double> scale, c10::string_view masked_rows) {
  static const auto op = find_op<decltype(gated_attention)>("torch_gated_attn::gated_attention");
  return op.call(query, key, value, gate, bias, mask, scale, masked_rows);
}

std::tuple<at::Tensor, at::Tensor> gated_attention_with_lse(const at::Tensor& query, const at::Tensor& key,
                                                            const at::Tensor& value, const OptionalTensor& gate,
                                                            const OptionalTensor& bias, const OptionalTensor& mask,
                                                            std::optional<double> scale, c10::string_view masked_rows) {
  static const auto op = find_op<decltype(gated_attention_with_lse)>("torch_gated_attn::gated_attention_with_lse");
  return op.call(query, key, value, gate, bias, mask, scale, masked_rows);
}

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                      const OptionalTensor& bias, const OptionalTensor& mask, std::optional<double> scale,
                      c10::string_view masked_rows) {
  static const auto op = find_op<decltype(forward)>("torch_gated_attn::_gated_attention_forward");
  return op.call(query, key, value, gate, bias, mask, scale, masked_rows);
}

Gradients backward(const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
                   const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate, const OptionalTensor& bias,
                   const OptionalTensor& mask, const at::Tensor& out, const at::Tensor& row_max, const at::Tensor& row_sum,
                   std::optional<double> scale, c10::string_view masked_rows, std::array<bool, 5> grad_mask) {
  static const auto op = find_op<decltype(backward)>("torch_gated_attn::_gated_attention_backward");
  return op.call(grad_out, grad_lse, query, key, value, gate, bias, mask, out, row_max, row_sum, scale, masked_rows,
                 grad_mask);
}

at::Tensor gate_output(const at::Tensor& out, const at::Tensor& gate) {
  static const auto op = find_op<decltype(gate_output)>("torch_gated_attn::gate_output");
  return op.call(out, gate);
}

std::tuple<at::Tensor, at::Tensor> gate_output_backward(const at::Tensor& grad, const at::Tensor& out,
                                                        const at::Tensor& gate, std::array<bool, 2> grad_mask) {
  static const auto op = find_op<decltype(gate_output_backward)>("torch_gated_attn::_gate_output_backward");
  return op.call(grad, out, gate, grad_mask);
}

#ifndef TORCH_GATED_ATTN_WITH_CUDA
namespace {

[[noreturn]] void refuse_cuda(const c10::OperatorHandle&, torch::jit::Stack*) {
  TORCH_CHECK(false,
              "query is on a CUDA device, but this build of torch_gated_attn has no CUDA kernels: rebuild it with "
              "TORCH_GATED_ATTN_CUDA=1 where nvcc and a CUDA build of torch are installed");
}

}  // namespace
#endif

}  // namespace torch_gated_attn

TORCH_LIBRARY(torch_gated_attn, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "gated_attention(Tensor query, Tensor key, Tensor value, Tensor? gate=None, Tensor? bias=None, Tensor? mask=None, *, "
      "float? scale=None, str masked_rows=\"zero\") -> Tensor",
      tags);
  m.def(
      "gated_attention_with_lse(Tensor query, Tensor key, Tensor value, Tensor? gate=None, Tensor? bias=None, "
      "Tensor? mask=None, *, float? scale=None, str masked_rows=\"zero\") -> (Tensor out, Tensor lse)",
      tags);
  m.def(
      "_gated_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? bias, Tensor? mask, "
      "float? scale, str masked_rows) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)",
      tags);
  m.def(
      "_gated_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? gate, "
      "Tensor? bias, Tensor? mask, Tensor out, Tensor row_max, Tensor row_sum, float? scale, str masked_rows, "
      "bool[5] grad_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def("gate_output(Tensor out, Tensor gate) -> Tensor", tags);
  m.def("_gate_output_backward(Tensor grad, Tensor out, Tensor gate, bool[2] grad_mask) -> (Tensor, Tensor)", tags);
}

TORCH_LIBRARY_IMPL(torch_gated_attn, CompositeImplicitAutograd, m) {
  m.impl("gated_attention", TORCH_FN(torch_gated_attn::gated_attention_implicit));
  m.impl("gated_attention_with_lse", TORCH_FN(torch_gated_attn::gated_attention_with_lse_implicit));
}

// The key above does not cover vmap, whose fallback would call the public ops once per mapped index.
TORCH_LIBRARY_IMPL(torch_gated_attn, FuncTorchBatchedDecomposition, m) {
  m.impl("gated_attention", TORCH_FN(torch_gated_attn::gated_attention_implicit));
  m.impl("gated_attention_with_lse", TORCH_FN(torch_gated_attn::gated_attention_with_lse_implicit));
}

#ifndef TORCH_GATED_ATTN_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_gated_attn, CUDA, m) {
  m.impl("_gated_attention_forward", torch::CppFunction::makeFromBoxedFunction<&torch_gated_attn::refuse_cuda>());
  m.impl("_gated_attention_backward", torch::CppFunction::makeFromBoxedFunction<&torch_gated_attn::refuse_cuda>());
}
#endif
