// SPDX-License-Identifier: BSD-3-Clause
#include "route.h"

#include <ATen/Context.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include "checks.h"
#include "cuda/select.h"
#include "position_masks.h"
#include "recording.h"

namespace torch_gated_attn {
namespace {

constexpr const char* kTooWide = "head_dim is above 128, the widest fused CUDA kernel";
static_assert(cuda::kMaxHeadDim == 128, "the sentence above says so");

bool wide(const Arguments& a) { return known_less(c10::SymInt(cuda::kMaxHeadDim), a.query.sym_size(-1)); }

}  // namespace

bool may_leave_fused(const Arguments& a) { return a.query.defined() && a.query.is_cuda() && a.query.dim() > 0 && wide(a); }

Route choose_core(const Arguments& a, c10::DeviceType device, bool bias_requires_grad) {
  const auto fused = [](const char* reason) { return Route{Core::kFused, reason}; };
  if (device != c10::kCUDA || !wide(a)) return fused("the operator has a kernel for it");
  // What PyTorch's attention does not do, or not in its fast kernels.
  if (a.masked_rows != "zero") return fused("masked_rows is not \"zero\"");
  if (!known_equal(a.value.sym_size(-1), a.query.sym_size(-1))) return fused("value's head_dim is not query's");
  const bool masked = given(a.mask) || a.is_causal || given(a.key_lengths);
  if (given(a.bias) && (masked || bias_requires_grad || a.bias->scalar_type() != a.query.scalar_type()))
    return fused("the bias needs a gradient, has another dtype, or comes with a mask");
  if (at::globalContext().deterministicAlgorithms()) return fused("deterministic algorithms are asked for");
  if (in_functorch_transform()) return fused("inside a torch.func transform");
  if (has_tangent(a.query) || has_tangent(a.key) || has_tangent(a.value) || has_tangent(a.gate) || has_tangent(a.bias))
    return fused("forward-mode derivatives are asked for");
  return {Core::kSdpa, kTooWide};
}

at::Tensor sdpa(const Arguments& a) {
  const auto batch_dims = a.query.dim() - 3;
  const auto heads = a.query.sym_size(-3), kv_heads = a.key.sym_size(-3);
  // PyTorch's flag stands the first query at the first key, ours the last at the last, which is the same for as many of
  // each. With another mask besides, all of them become one.
  const bool flag = a.is_causal && !given(a.mask) && !given(a.key_lengths) && !a.window &&
                    known_equal(a.query.sym_size(-2), a.key.sym_size(-2));
  OptionalTensor terms = given(a.bias) ? a.bias : given(a.mask) ? a.mask : OptionalTensor();
  const auto hide = [&](const at::Tensor& hidden) {
    terms = terms ? terms->logical_and(hidden.logical_not()) : hidden.logical_not();
  };
  if (a.is_causal && !flag) hide(hidden_by_position(a));
  if (given(a.key_lengths)) hide(beyond_lengths(a));
  at::Tensor query = a.query, key = a.key, value = a.value;
  const bool grouped = !known_equal(heads, kv_heads);
  const auto repeated = [&](const at::Tensor& t) {  // with grouped heads a mask would send PyTorch to its slow path
    return grouped && terms ? t.repeat_interleave_symint(heads / kv_heads, -3) : t;
  };
  key = repeated(key), value = repeated(value);
  const auto four_dims = [&](const at::Tensor& t) {  // which the fast kernels take
    return batch_dims == 1 ? t : batch_dims == 0 ? t.unsqueeze(0) : t.flatten(0, batch_dims - 1);
  };
  if (terms && terms->dim() > 3 && batch_dims != 1) {
    auto sizes = a.query.sym_sizes().slice(0, batch_dims).vec();
    for (const int64_t d : {-3, -2, -1}) sizes.push_back(terms->sym_size(d));
    terms = four_dims(terms->expand_symint(sizes));
  }
  const auto batch = a.query.sym_sizes().slice(0, batch_dims).vec();
  at::Tensor out = at::scaled_dot_product_attention(four_dims(query), four_dims(key), four_dims(value), terms,
                                                    /*dropout_p=*/0.0, flag, a.scale, /*enable_gqa=*/grouped && !terms);
  if (batch_dims == 0) out = out.squeeze(0);
  if (batch_dims > 1) out = out.unflatten_symint(0, batch);
  return given(a.gate) ? gate_output(out, *a.gate) : out;
}

}  // namespace torch_gated_attn
