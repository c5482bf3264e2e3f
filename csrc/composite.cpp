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
#include <vector>

#include "outputs.h"
#include "position_masks.h"

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
  at::Tensor logits;         // [*, H, Q, K], zero in dead rows
  at::Tensor shift, sum;     // [*, H, Q, 1] the largest logit; sum_j exp(s_ij - shift)
  at::Tensor probabilities;  // [*, H, Q, K], zero in dead rows
  at::Tensor mean;           // [*, H, 1, Dv] what masked_rows = "mean" puts into dead rows; else undefined
};

// Keys that no query of a batch entry attends to may hold NaN or Inf, and 0 * NaN would let them through. `hidden`
// broadcasts to [*, H, 1, K].
void forget_keys(Attention& a, const at::Tensor& hidden) {
  a.key = a.key.masked_fill(transposed(hidden), 0);
  a.value = a.value.masked_fill(transposed(hidden), 0);
}

Attention attend(const Arguments& c) {
  const auto type = accumulation_type(c.query.scalar_type());
  const auto heads = c.query.sym_size(-3);
  Attention a;
  a.query = c.query.to(type);
  a.key = repeat_heads(c.key.to(type), heads);
  a.value = repeat_heads(c.value.to(type), heads);
  if (given(c.gate)) a.gate = c.gate->to(type).sigmoid();
  a.scale = scale_of(c.scale, c.query);
  a.keys = c.key.sym_size(-2).max(c10::SymInt(1));
  const at::Tensor every_value = a.value;

  std::vector<at::Tensor> hidden;
  if (given(c.mask)) {
    at::Tensor excluded = c.mask->logical_not();
    while (excluded.dim() < 2) excluded = excluded.unsqueeze(0);
    if (known_equal(excluded.sym_size(-2), c10::SymInt(1))) forget_keys(a, excluded);
    hidden.push_back(excluded);
  }
  if (given(c.key_lengths)) hidden.push_back(beyond_lengths(c)), forget_keys(a, hidden.back());
  if (c.is_causal) {
    hidden.push_back(hidden_by_position(c));
    // Without a window the last query sees every key.
    if (c.window) forget_keys(a, hidden.back().all(-2, /*keepdim=*/true));
  }
  auto logits = at::matmul(a.query, transposed(a.key)) * a.scale;
  if (given(c.bias)) logits = logits + c.bias->to(type);
  for (const at::Tensor& h : hidden) logits = logits.masked_fill(h, -kInfinity);

  // Dead rows get finite logits before exp and log, so that their derivatives are 0 and never inf * 0.
  a.dead = logits.eq(-kInfinity).all(-1, /*keepdim=*/true);
  a.logits = logits.masked_fill(a.dead, 0);
  const bool no_keys = known_equal(c.key.sym_size(-2), c10::SymInt(0));  // amax refuses an empty dimension
  a.shift = no_keys ? a.logits.detach().sum(-1, true) : at::amax(a.logits.detach(), -1, true);
  const auto exponentials = (a.logits - a.shift).exp();
  a.sum = exponentials.sum(-1, true);
  a.probabilities = (exponentials / a.sum).masked_fill(a.dead, 0);
  if (c.masked_rows == "mean") a.mean = every_value.sum(-2, true) / a.keys;
  return a;
}

// Probabilities as the forward's residuals say, which may come from more keys than these (merged over shards). Their
// values decide; derivatives of the sum flow through the logits at hand, since row_sum itself is a constant here.
at::Tensor probabilities_by(const Attention& a, const at::Tensor& row_max, const at::Tensor& row_sum) {
  const auto shift = row_max.detach().unsqueeze(-1), sum = row_sum.detach().unsqueeze(-1);
  const auto dead = sum.eq(0).logical_or(a.dead);
  const auto type = a.logits.scalar_type();
  // In units of log2, as the kernels compare them: at -1e9 another rounding of the shift would be a factor of e^64.
  // The lowest number stays finite there, as in the kernels.
  const auto excluded = a.logits.eq(-kInfinity);
  const auto lowest = type == at::kDouble ? std::numeric_limits<double>::lowest() : std::numeric_limits<float>::lowest();
  const auto logits = (a.logits * kLog2e).clamp_min(lowest).masked_fill(excluded, -kInfinity);
  const auto local = (logits - shift.masked_fill(dead, 0)).masked_fill(dead, 0).exp2();
  const auto local_sum = local.sum(-1, true);
  const auto given_sum = sum.masked_fill(dead, 1) + (local_sum - local_sum.detach());
  return (local / given_sum).masked_fill(dead, 0);
}

// The same values, their dimensions in memory as those of `like`.
at::Tensor in_order_of(const at::Tensor& like, const at::Tensor& tensor) {
  const auto order = memory_order<c10::SymInt>(like);
  at::DimVector back(order.size());
  for (size_t i = 0; i < order.size(); ++i) back[order[i]] = static_cast<int64_t>(i);
  return tensor.permute(order).contiguous().permute(back);
}

}  // namespace

ForwardResult forward_composite(const Arguments& c) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto a = attend(c);
  auto out = at::matmul(a.probabilities, a.value);
  if (a.mean.defined()) out = at::where(a.dead, a.mean, out);
  if (a.gate.defined()) out = out * a.gate;
  const auto lse = (a.shift + a.sum.log()).masked_fill(a.dead, -kInfinity);
  return {in_order_of(c.query, out.to(c.query.scalar_type())), lse.squeeze(-1), (a.shift * kLog2e).squeeze(-1),
          a.sum.detach().masked_fill(a.dead, 0).squeeze(-1)};
}

Gradients backward_composite(const BackwardArguments& c) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto a = attend(c);
  const auto type = a.query.scalar_type();
  const auto out = c.out.to(type), d_out = given(c.grad_out) ? c.grad_out->to(type) : at::zeros_like(out);
  const auto d_result = a.gate.defined() ? d_out * a.gate : d_out;
  const auto dead = c.row_sum.eq(0).unsqueeze(-1);  // no key attended, in no shard
  const auto probabilities = probabilities_by(a, c.row_max, c.row_sum);
  auto delta = (d_out * out).sum(-1, true);
  if (given(c.grad_lse)) delta = delta - c.grad_lse->unsqueeze(-1);
  const auto d_logits = probabilities * (at::matmul(d_result, transposed(a.value)) - delta.masked_fill(dead, 0));

  Gradients result;
  auto& [d_query, d_key, d_value, d_gate, d_bias] = result;
  if (c.grad_mask[0]) d_query = (at::matmul(d_logits, a.key) * a.scale).to(c.query.scalar_type());
  if (c.grad_mask[1]) d_key = sum_head_groups(at::matmul(transposed(d_logits), a.query) * a.scale, c.key);
  if (c.grad_mask[2]) {
    auto d_values = at::matmul(transposed(probabilities), d_result);
    if (c.masked_rows == "mean") d_values = d_values + d_result.masked_fill(dead.logical_not(), 0).sum(-2, true) / a.keys;
    d_value = sum_head_groups(d_values, c.value);
  }
  // From the gated output, as in the kernels: also where these keys are not all the keys, or there are none.
  if (c.grad_mask[3] && a.gate.defined()) d_gate = sum_broadcast(d_out * out * (-c.gate->to(type)).sigmoid(), *c.gate);
  if (c.grad_mask[4] && given(c.bias)) d_bias = sum_broadcast(d_logits, *c.bias);
  return result;
}

}  // namespace torch_gated_attn
