// SPDX-License-Identifier: BSD-3-Clause
//
// Forward and backward as ATen formulas that PyTorch can differentiate any number of times, forwards and backwards. They
// are written so that no derivative of any order is NaN at a row that attends to no key. Sizes are read as symbols: a plain
// size() would make a traced dimension constant. Arguments have passed checks.h.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/SymFloat.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>

#include "outputs.h"

namespace torch_gated_attn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLog2e = 1.4426950408889634;

at::Scalar scale_of(std::optional<double> scale, const at::Tensor& query) {
  if (scale) return *scale;
  const auto head_dim = query.sym_size(-1);
  if (known_equal(head_dim, c10::SymInt(0))) return 1.0;  // no product to scale, but 0 * inf would be NaN
  return c10::SymFloat(1.0) / c10::SymFloat(head_dim).sqrt();
}

at::Tensor transposed(const at::Tensor& tensor) { return tensor.transpose(-1, -2); }

// [*, Hkv, K, C] -> [*, H, K, C]: every query head gets its group's key/value head.
at::Tensor repeat_heads(const at::Tensor& tensor, const c10::SymInt& heads) {
  const auto kv_heads = tensor.sym_size(-3);
  if (known_equal(kv_heads, heads)) return tensor;
  const auto groups = tensor.unsqueeze(-3);
  auto sizes = groups.sym_sizes().vec();
  sizes[sizes.size() - 3] = heads / kv_heads;
  return groups.expand_symint(sizes).flatten(-4, -3);
}

// The adjoint of repeat_heads, rounded to the dtype of `input`.
at::Tensor sum_head_groups(const at::Tensor& gradient, const at::Tensor& input) {
  const auto heads = gradient.sym_size(-3), kv_heads = input.sym_size(-3);
  if (known_equal(kv_heads, heads)) return gradient.to(input.scalar_type());
  return gradient.unflatten_symint(-3, {kv_heads, heads / kv_heads}).sum(-3).to(input.scalar_type());
}

at::Tensor sum_broadcast(const at::Tensor& gradient, const at::Tensor& input) {
  return at::sum_to(gradient, input.sym_sizes()).to(input.scalar_type());
}

// What both directions need, in the accumulation type, with the heads of key and value repeated.
struct Attention {
  at::Tensor query, key, value;  // [*, H, Q, D], [*, H, K, D], [*, H, K, Dv]; zero at keys that no query attends to
  at::Tensor gate;               // sigmoid, or undefined
  at::Scalar scale;
  at::Scalar keys;           // K, or 1 if there is none
  at::Tensor dead;           // [*, H, Q, 1] the row attends to no key
  at::Tensor shift, sum;     // [*, H, Q, 1] the largest logit; sum_j exp(s_ij - shift)
  at::Tensor probabilities;  // [*, H, Q, K], zero in dead rows
  at::Tensor attended;       // [*, H, Q, Dv] probabilities * value
  at::Tensor result;         // [*, H, Q, Dv] attended, or what masked_rows puts into dead rows
};

Attention attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                 const OptionalTensor& bias, const OptionalTensor& mask, std::optional<double> scale,
                 c10::string_view masked_rows) {
  const auto type = accumulation_type(query.scalar_type());
  const auto heads = query.sym_size(-3);
  Attention a;
  a.query = query.to(type);
  a.key = repeat_heads(key.to(type), heads);
  a.value = repeat_heads(value.to(type), heads);
  if (given(gate)) a.gate = gate->to(type).sigmoid();
  a.scale = scale_of(scale, query);
  a.keys = key.sym_size(-2).max(c10::SymInt(1));
  const at::Tensor every_value = a.value;

  at::Tensor excluded;
  if (given(mask)) {
    excluded = mask->logical_not();
    while (excluded.dim() < 2) excluded = excluded.unsqueeze(0);
    // A mask without a query dimension hides keys whose contents may be NaN or Inf, and 0 * NaN would let them through.
    if (known_equal(excluded.sym_size(-2), c10::SymInt(1))) {
      a.key = a.key.masked_fill(transposed(excluded), 0);
      a.value = a.value.masked_fill(transposed(excluded), 0);
    }
  }
  auto logits = at::matmul(a.query, transposed(a.key)) * a.scale;
  if (given(bias)) logits = logits + bias->to(type);
  if (given(mask)) logits = logits.masked_fill(excluded, -kInfinity);

  // Dead rows get finite logits before exp and log, so that their derivatives are 0 and never inf * 0.
  a.dead = logits.eq(-kInfinity).all(-1, /*keepdim=*/true);
  logits = logits.masked_fill(a.dead, 0);
  const bool no_keys = known_equal(key.sym_size(-2), c10::SymInt(0));  // amax refuses an empty dimension
  a.shift = no_keys ? logits.detach().sum(-1, true) : at::amax(logits.detach(), -1, true);
  const auto exponentials = (logits - a.shift).exp();
  a.sum = exponentials.sum(-1, true);
  a.probabilities = (exponentials / a.sum).masked_fill(a.dead, 0);

  a.attended = at::matmul(a.probabilities, a.value);
  a.result = masked_rows == "mean" ? at::where(a.dead, every_value.sum(-2, true) / a.keys, a.attended) : a.attended;
  return a;
}

// The same values, their dimensions in memory as those of `like`.
at::Tensor in_order_of(const at::Tensor& like, const at::Tensor& tensor) {
  const auto order = memory_order<c10::SymInt>(like);
  at::DimVector back(order.size());
  for (size_t i = 0; i < order.size(); ++i) back[order[i]] = static_cast<int64_t>(i);
  return tensor.permute(order).contiguous().permute(back);
}

}  // namespace

ForwardResult forward_composite(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                                std::optional<double> scale, c10::string_view masked_rows) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto a = attend(query, key, value, gate, bias, mask, scale, masked_rows);
  const auto out = a.gate.defined() ? a.result * a.gate : a.result;
  const auto lse = (a.shift + a.sum.log()).masked_fill(a.dead, -kInfinity);
  return {in_order_of(query, out.to(query.scalar_type())), lse.squeeze(-1), (a.shift * kLog2e).squeeze(-1),
          a.sum.detach().masked_fill(a.dead, 0).squeeze(-1)};
}

Gradients backward_composite(const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
                             const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                             const OptionalTensor& bias, const OptionalTensor& mask, std::optional<double> scale,
                             c10::string_view masked_rows, std::array<bool, 5> grad_mask) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto a = attend(query, key, value, gate, bias, mask, scale, masked_rows);
  const auto d_out = given(grad_out) ? grad_out->to(a.result.scalar_type()) : at::zeros_like(a.result);
  const auto d_result = a.gate.defined() ? d_out * a.gate : d_out;
  auto delta = (d_result * a.attended).sum(-1, true);
  if (given(grad_lse)) delta = delta - grad_lse->unsqueeze(-1).masked_fill(a.dead, 0);
  const auto d_logits = a.probabilities * (at::matmul(d_result, transposed(a.value)) - delta);

  Gradients result;
  auto& [d_query, d_key, d_value, d_gate, d_bias] = result;
  if (grad_mask[0]) d_query = (at::matmul(d_logits, a.key) * a.scale).to(query.scalar_type());
  if (grad_mask[1]) d_key = sum_head_groups(at::matmul(transposed(d_logits), a.query) * a.scale, key);
  if (grad_mask[2]) {
    auto d_values = at::matmul(transposed(a.probabilities), d_result);
    if (masked_rows == "mean") d_values = d_values + d_result.masked_fill(a.dead.logical_not(), 0).sum(-2, true) / a.keys;
    d_value = sum_head_groups(d_values, value);
  }
  if (grad_mask[3] && a.gate.defined()) d_gate = sum_broadcast(d_out * a.result * a.gate * (1 - a.gate), *gate);
  if (grad_mask[4] && given(bias)) d_bias = sum_broadcast(d_logits, *bias);
  return result;
}

}  // namespace torch_gated_attn
