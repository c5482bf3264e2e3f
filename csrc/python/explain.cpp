// SPDX-License-Identifier: BSD-3-Clause
#include "explain.h"

#include <ATen/ops/empty_strided.h>

#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cuda/select.h"
#include "../operands.h"
#include "../outputs.h"
#include "../route.h"

namespace torch_gated_attn {
namespace {

at::ScalarType scalar_type(const std::string& name) {
  // Also those that no call takes: its checks say so better.
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf, at::kBool, at::kByte, at::kChar, at::kShort,
                          at::kInt, at::kLong, at::kComplexFloat, at::kComplexDouble})
    if (name == c10::getDtypeNames(type).first) return type;
  TORCH_CHECK_TYPE(false, "explain was given a tensor of dtype ", name, ", which no kernel takes");
}

// A tensor of this layout without memory; describe() takes its offset for an address.
at::Tensor on_meta(const Layout& layout) {
  const auto& [dtype, sizes, strides, address] = layout;
  const auto options = at::TensorOptions().dtype(scalar_type(dtype)).device(at::kMeta);
  const at::Tensor whole = at::empty_strided(sizes, strides, options);
  return whole.as_strided(sizes, strides, address / static_cast<int64_t>(whole.element_size()));
}

BackwardArguments arguments_of(const CallLayout& call) {
  std::array<OptionalTensor, 7> t;
  for (size_t i = 0; i < t.size(); ++i)
    if (call.tensors[i]) t[i] = on_meta(*call.tensors[i]);
  const auto required = [](const OptionalTensor& x) { return x.value_or(at::Tensor()); };
  BackwardArguments a;
  a.query = required(t[0]), a.key = required(t[1]), a.value = required(t[2]);
  a.gate = t[3], a.bias = t[4], a.mask = t[5], a.key_lengths = t[6];
  a.scale = call.scale, a.masked_rows = call.masked_rows, a.is_causal = call.is_causal, a.window = call.window;
  a.grad_mask = call.grad_mask;
  return a;
}

// The rest of a backward's arguments, as its forward and the loss would make them.
void add_results(BackwardArguments& a) {
  at::Tensor lse;
  std::tie(a.out, lse, a.row_max, a.row_sum) = empty_forward<int64_t>(a);
  a.grad_out = a.out;
}

const char* name_of(cuda::BiasAccess access) {
  switch (access) {
    case cuda::BiasAccess::kNone: return "none";
    case cuda::BiasAccess::kHalf: return "16-bit fragments";
    case cuda::BiasAccess::kFloat: return "float32 fragments";
    default: return "one element at a time";
  }
}

}  // namespace

Explanation explain(const CallLayout& call, std::optional<int> arch) {
  BackwardArguments a = arguments_of(call);
  const bool backward = std::any_of(call.grad_mask.begin(), call.grad_mask.end(), [](bool wanted) { return wanted; });
  const PreparedForward forward(a);  // its checks are the call's
  if (std::get<0>(forward.result).numel() == 0) return {"none", "the result has no elements", {}};
  if (forward.done) return {"none", "there are no keys: the results are zeros", {}};
  const Route route = choose_core(a, arch ? at::kCUDA : at::kCPU, call.bias_requires_grad);
  if (route.core == Core::kSdpa) return {"sdpa", route.reason, {}};
  std::optional<Problem> problem = forward.problem;
  if (backward) add_results(a), problem = PreparedBackward(a, /*wide_gate_sums=*/arch.has_value()).problem;
  if (!problem) return {"composite", kTooManyDims, {}};
  if (!arch) {
    const CpuChoice choice = choose_cpu(*problem);
    return {choice.kernel, choice.reason, {{"instruction_set", cpu_capability()}}};
  }
  const cuda::Choice choice = backward ? cuda::choose_backward(*problem, *arch) : cuda::choose_forward(*problem, *arch);
  std::map<std::string, std::string> details;
  if (choice.kernel != cuda::Kernel::kComposite) details["compiled_head_dim"] = std::to_string(choice.head_dim);
  if (choice.kernel == cuda::Kernel::kTensorCore) details["bias"] = name_of(choice.access);
  return {cuda::name(choice), choice.reason, details};
}

}  // namespace torch_gated_attn
