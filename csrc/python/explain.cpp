// SPDX-License-Identifier: BSD-3-Clause
#include "explain.h"

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cuda/select.h"
#include "../describe.h"
#include "../outputs.h"

namespace torch_gated_attn {
namespace {

// Where a tensor begins that PyTorch allocates for the call: aligned for every access.
constexpr int64_t kAllocated = 256;

at::ScalarType scalar_type(const std::string& name) {
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf, at::kBool})
    if (name == c10::getDtypeNames(type).first) return type;
  TORCH_CHECK_TYPE(false, "explain was given a tensor of dtype ", name, ", which no kernel takes");
}

at::Tensor on_meta(const std::optional<Layout>& layout) {
  if (!layout) return {};
  const auto& [dtype, sizes, strides, address] = *layout;
  return at::empty_strided(sizes, strides, at::TensorOptions().dtype(scalar_type(dtype)).device(at::kMeta));
}

// describe() looks at addresses but reads nothing, so a tensor may stand for one that is not there.
at::Tensor stand_in(const at::Tensor& meta, int64_t address) {
  if (!meta.defined()) return meta;
  return at::from_blob(
      reinterpret_cast<void*>(address), meta.sizes(), meta.strides(), [](void*) {},
      at::TensorOptions().dtype(meta.scalar_type()).device(at::kCPU));
}

// The operands as the launchers hand them to the kernels.
Problem problem_of(const CallLayout& call) {
  std::array<at::Tensor, 6> given_tensors, read;
  for (size_t i = 0; i < read.size(); ++i) {
    const at::Tensor meta = given_tensors[i] = on_meta(call.tensors[i]);
    const at::Tensor prepared = i < 3 ? with_contiguous_rows(meta) : i == 3 ? with_dense_rows(meta) : meta;
    const bool same = !meta.defined() || prepared.is_same(meta);
    read[i] = stand_in(prepared, meta.defined() && same ? std::get<3>(*call.tensors[i]) : kAllocated);
  }
  const auto& [query, key, value, gate, bias, mask] = given_tensors;
  const auto allocated = [&](const at::Tensor& meta) { return stand_in(with_contiguous_rows(meta), kAllocated); };
  const auto [out, lse, row_max, row_sum] = empty_forward<int64_t>(query, value);
  Operands o;
  o.query = read[0], o.key = read[1], o.value = read[2], o.gate = read[3], o.bias = read[4], o.mask = read[5];
  o.out = allocated(out), o.row_max = stand_in(row_max, kAllocated), o.row_sum = stand_in(row_sum, kAllocated);
  const bool backward = std::any_of(call.grad_mask.begin(), call.grad_mask.end(), [](bool wanted) { return wanted; });
  if (backward) {
    const auto optional = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); };
    const auto [d_query, d_key, d_value, d_gate, d_bias] =
        empty_gradients<int64_t>(query, key, value, optional(gate), optional(bias), call.grad_mask);
    o.grad_out = allocated(out);
    o.d_query = allocated(d_query), o.d_key = allocated(d_key), o.d_value = allocated(d_value);
    o.d_gate = stand_in(d_gate, kAllocated), o.d_bias = stand_in(d_bias, kAllocated);
  } else {
    o.lse = stand_in(lse, kAllocated);
  }
  return describe(o, call.scale, call.masked_rows);
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
  const bool backward = std::any_of(call.grad_mask.begin(), call.grad_mask.end(), [](bool wanted) { return wanted; });
  if (!arch) {
    const Problem problem = problem_of(call);
    const CpuChoice choice = choose_cpu(problem);
    return {choice.kernel, choice.reason, {{"instruction_set", cpu_capability()}}};
  }
  const Problem problem = problem_of(call);
  const cuda::Choice choice = backward ? cuda::choose_backward(problem, *arch) : cuda::choose_forward(problem, *arch);
  std::map<std::string, std::string> details;
  if (choice.kernel != cuda::Kernel::kComposite) details["compiled_head_dim"] = std::to_string(choice.head_dim);
  if (choice.kernel == cuda::Kernel::kTensorCore) details["bias"] = name_of(choice.access);
  return {cuda::name(choice), choice.reason, details};
}

}  // namespace torch_gated_attn
