// SPDX-License-Identifier: BSD-3-Clause
//
// Schemas, the calls into the dispatcher, and the public ops over the functional ones. Schemas are append-only: exported
// programs hold them all.
#include "gated_attention.h"

#include <torch/library.h>

#include "checks.h"
#include "recording.h"
#include "route.h"

namespace torch_gated_attn {
namespace {

// The fused op refuses tensors that have no strided dense memory; what it needs beyond that, its kernels check.
ForwardResult attend(const Arguments& a) {
  check_strided("query", a.query);
  check_strided("key", a.key);
  check_strided("value", a.value);
  if (given(a.gate)) check_strided("gate", *a.gate);
  if (given(a.bias)) check_strided("bias", *a.bias);
  if (given(a.mask)) check_strided("mask", *a.mask);
  if (given(a.key_lengths)) check_strided("key_lengths", *a.key_lengths);
  return forward(a);
}

at::Tensor gated_attention_implicit(const Arguments& a) {
  if (may_leave_fused(a)) {
    check_forward<c10::SymInt>(a);
    if (choose_core(a, a.query.device().type(), requires_grad(a.bias)).core == Core::kSdpa) return sdpa(a);
  }
  return std::get<0>(attend(a));
}

std::tuple<at::Tensor, at::Tensor> gated_attention_with_lse_implicit(const Arguments& a) {
  auto [out, lse, row_max, row_sum] = attend(a);
  return {std::move(out), std::move(lse)};
}

}  // namespace

at::Tensor gated_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                           std::optional<double> scale, c10::string_view masked_rows, bool is_causal,
                           std::optional<int64_t> window, const OptionalTensor& key_lengths) {
  return dispatch<gated_attention_implicit>(
      "torch_gated_attn::gated_attention",
      Arguments{query, key, value, gate, bias, mask, scale, masked_rows, is_causal, window, key_lengths});
}

std::tuple<at::Tensor, at::Tensor> gated_attention_with_lse(const at::Tensor& query, const at::Tensor& key,
                                                            const at::Tensor& value, const OptionalTensor& gate,
                                                            const OptionalTensor& bias, const OptionalTensor& mask,
                                                            std::optional<double> scale, c10::string_view masked_rows,
                                                            bool is_causal, std::optional<int64_t> window,
                                                            const OptionalTensor& key_lengths) {
  return dispatch<gated_attention_with_lse_implicit>(
      "torch_gated_attn::gated_attention_with_lse",
      Arguments{query, key, value, gate, bias, mask, scale, masked_rows, is_causal, window, key_lengths});
}

ForwardResult forward(const Arguments& a) { return dispatch<forward>("torch_gated_attn::_gated_attention_forward", a); }
Gradients backward(const BackwardArguments& a) {
  return dispatch<backward>("torch_gated_attn::_gated_attention_backward", a);
}

namespace {

template <class Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

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
  const auto define = [&](const char* name, const char* arguments, const char* results) {
    m.def((std::string(name) + arguments + " -> " + results).c_str(), tags);
  };
  using namespace torch_gated_attn;
  define("gated_attention", kPublicSchema, "Tensor");
  define("gated_attention_with_lse", kPublicSchema, "(Tensor out, Tensor lse)");
  define("_gated_attention_forward", kForwardSchema, "(Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)");
  define("_gated_attention_backward", kBackwardSchema, "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gate_output(Tensor out, Tensor gate) -> Tensor", tags);
  m.def("_gate_output_backward(Tensor grad, Tensor out, Tensor gate, bool[2] grad_mask) -> (Tensor, Tensor)", tags);
}

TORCH_LIBRARY_IMPL(torch_gated_attn, CompositeImplicitAutograd, m) {
  using namespace torch_gated_attn;
  m.impl("gated_attention", TORCH_FN(Packed<gated_attention_implicit>::call));
  m.impl("gated_attention_with_lse", TORCH_FN(Packed<gated_attention_with_lse_implicit>::call));
}

// The key above does not cover vmap, whose fallback would call the public ops once per mapped index.
TORCH_LIBRARY_IMPL(torch_gated_attn, FuncTorchBatchedDecomposition, m) {
  using namespace torch_gated_attn;
  m.impl("gated_attention", TORCH_FN(Packed<gated_attention_implicit>::call));
  m.impl("gated_attention_with_lse", TORCH_FN(Packed<gated_attention_with_lse_implicit>::call));
}

#ifndef TORCH_GATED_ATTN_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_gated_attn, CUDA, m) {
  m.impl("_gated_attention_forward", torch::CppFunction::makeFromBoxedFunction<&torch_gated_attn::refuse_cuda>());
  m.impl("_gated_attention_backward", torch::CppFunction::makeFromBoxedFunction<&torch_gated_attn::refuse_cuda>());
}
#endif
