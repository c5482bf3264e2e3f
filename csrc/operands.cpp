// SPDX-License-Identifier: BSD-3-Clause
#include "operands.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "checks.h"
#include "cpu/ordered_sum.h"

namespace torch_gated_attn {
namespace {

at::Tensor tensor_of(const OptionalTensor& t) { return given(t) ? *t : at::Tensor(); }

// Positions, heads of a group and dimensions are 32-bit in the kernels, and padded.
void check_limits(const Arguments& a) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() - 4096;
  const auto check = [&](const char* name, const at::Tensor& tensor, int64_t size, const char* what) {
    TORCH_CHECK_VALUE(size <= kMax, name, " must have at most ", kMax, " ", what, ", but has shape ", tensor.sizes());
  };
  check("query", a.query, a.query.size(-2), "positions");
  check("key", a.key, a.key.size(-2), "positions");
  check("query", a.query, a.query.size(-1), "dimensions per head");
  check("value", a.value, a.value.size(-1), "dimensions per head");
  check("query", a.query, a.query.size(-3) / a.key.size(-3), "heads per head of key");
}

void prepare_inputs(const Arguments& a, Operands& o) {
  o.query = with_contiguous_rows(a.query), o.key = with_contiguous_rows(a.key), o.value = with_contiguous_rows(a.value);
  o.gate = with_dense_rows(tensor_of(a.gate)), o.bias = with_dense_rows(tensor_of(a.bias)), o.mask = tensor_of(a.mask);
  // The kernels read a bias of the query's dtype, or float32 beside 16-bit types.
  if (o.bias.defined() && a.query.scalar_type() == at::kDouble) o.bias = o.bias.to(at::kDouble);
  if (given(a.key_lengths)) o.key_lengths = a.key_lengths->to(at::kLong);
}

// Operands with a row of every query or key walk their batch dimensions alike once they are contiguous.
void make_contiguous(Operands& o) {
  for (at::Tensor* t : {&o.query, &o.key, &o.value, &o.out, &o.grad_out, &o.grad_lse, &o.key_lengths})
    if (t->defined()) *t = t->contiguous();
}
void fresh_if_not_contiguous(at::Tensor& t) {
  if (t.defined() && !t.is_contiguous()) t = at::empty(t.sizes(), t.options());
}

void copy_if_elsewhere(const at::Tensor& to, const at::Tensor& from) {
  if (to.defined() && !to.is_same(from)) to.copy_(from);
}

// Whether a gate's gradient has its own element, or its own headwise one, for every query: the kernels write that.
bool per_query(const at::Tensor& d_gate, const at::Tensor& out) {
  return d_gate.dim() == out.dim() && d_gate.sizes().slice(0, out.dim() - 1) == out.sizes().slice(0, out.dim() - 1);
}

}  // namespace

PreparedForward::PreparedForward(const Arguments& a) {
  check_forward<int64_t>(a);
  result = empty_forward<int64_t>(a);
  auto& [out, lse, row_max, row_sum] = result;
  done = lse.numel() == 0 || a.key.size(-2) == 0;
  if (done) {
    out.zero_(), row_max.zero_(), row_sum.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
    return;
  }
  check_limits(a);
  prepare_inputs(a, operands);
  operands.lse = lse, operands.row_max = row_max, operands.row_sum = row_sum;
  // Kernels store rows of dimensions; a result whose head_dim is not innermost is copied into place.
  operands.out = with_contiguous_rows(out);
  problem = describe(operands, a);
  if (problem) return;
  fresh_if_not_contiguous(operands.out);
  make_contiguous(operands);
  problem = describe(operands, a);
}

ForwardResult PreparedForward::finish() {
  if (!done) copy_if_elsewhere(std::get<0>(result), operands.out);
  return result;
}

ForwardResult PreparedForward::by_formula(const Arguments& a) {
  auto& [out, lse, row_max, row_sum] = result;
  const auto [y, l, m, s] = forward_composite(a);
  out.copy_(y), lse.copy_(l), row_max.copy_(m), row_sum.copy_(s);
  return result;
}

PreparedBackward::PreparedBackward(const BackwardArguments& a, bool wide_gate_sums) {
  check_backward<int64_t>(a);
  result = empty_gradients<int64_t>(a);
  auto& [d_query, d_key, d_value, d_gate, d_bias] = result;
  done = a.row_sum.numel() == 0 || a.key.size(-2) == 0;
  if (done) {
    for (const at::Tensor* t : {&d_query, &d_key, &d_value, &d_gate, &d_bias})
      if (t->defined()) t->zero_();
    // `out` may come from more keys than these.
    if (d_gate.defined() && a.row_sum.numel() > 0) {
      BackwardArguments only_gate = a;
      only_gate.grad_mask = {false, false, false, true, false};
      d_gate.copy_(std::get<3>(backward_composite(only_gate)));
    }
    return;
  }
  check_limits(a);
  Operands& o = operands;
  prepare_inputs(a, o);
  o.out = with_contiguous_rows(a.out), o.row_max = a.row_max.contiguous(), o.row_sum = a.row_sum.contiguous();
  o.grad_out = with_contiguous_rows(tensor_of(a.grad_out)), o.grad_lse = tensor_of(a.grad_lse);
  o.d_query = with_contiguous_rows(d_query), o.d_key = with_contiguous_rows(d_key);
  o.d_value = with_contiguous_rows(d_value), o.d_gate = with_dense_rows(d_gate);
  // A gate that is broadcast otherwise than over the head's dimensions gets its gradient from a full one.
  sums_gate = d_gate.defined() && !per_query(d_gate, a.out);
  if (sums_gate) {
    auto sizes = a.out.sizes().vec();
    if (d_gate.dim() == 0 || d_gate.size(-1) == 1) sizes.back() = 1;
    o.d_gate = at::empty(sizes, (wide_gate_sums ? a.row_sum : a.out).options());
  }
  const bool cast_bias = d_bias.defined() && d_bias.scalar_type() != o.bias.scalar_type();
  o.d_bias = cast_bias ? at::empty(d_bias.sizes(), o.bias.options()) : d_bias;
  problem = describe(o, a);
  if (problem) return;
  for (at::Tensor* t : {&o.d_query, &o.d_key, &o.d_value, &o.d_gate}) fresh_if_not_contiguous(*t);
  make_contiguous(o);
  problem = describe(o, a);
}

Gradients PreparedBackward::finish() {
  auto& [d_query, d_key, d_value, d_gate, d_bias] = result;
  if (done) return result;
  copy_if_elsewhere(d_query, operands.d_query), copy_if_elsewhere(d_key, operands.d_key);
  copy_if_elsewhere(d_value, operands.d_value), copy_if_elsewhere(d_bias, operands.d_bias);
  if (!sums_gate) {
    copy_if_elsewhere(d_gate, operands.d_gate);
  } else if (d_gate.is_cpu()) {
    ordered_sum(broadcast_dims_first(operands.d_gate, d_gate.sizes()), d_gate);
  } else {
    d_gate.copy_(operands.d_gate.sum_to_size(d_gate.sizes()));
  }
  return result;
}

Gradients PreparedBackward::by_formula(const BackwardArguments& a) {
  auto& [d_query, d_key, d_value, d_gate, d_bias] = result;
  const auto [query, key, value, gate, bias] = backward_composite(a);
  copy_if_elsewhere(d_query, query), copy_if_elsewhere(d_key, key), copy_if_elsewhere(d_value, value);
  copy_if_elsewhere(d_gate, gate), copy_if_elsewhere(d_bias, bias);
  return result;
}

}  // namespace torch_gated_attn
