// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU kernels of the dispatcher: checks, allocation, threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <limits>

#include "../checks.h"
#include "../describe.h"
#include "dispatch.h"
#include "ordered_sum.h"
#include "schedule.h"

namespace torch_gated_attn {
namespace {

at::Tensor tensor_of(const OptionalTensor& t) { return given(t) ? *t : at::Tensor(); }

// Fresh memory is touched for the first time by the kernels: on 4 KiB pages the faults of a training step are a
// noticeable part of its time. Large results therefore ask for huge pages, as NumPy does for its arrays.
const at::Tensor& prefer_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (!tensor.defined() || tensor.nbytes() < 2 * kHugePage) return tensor;
  // Whole huge pages inside the tensor only. A kernel that refuses leaves the pages small, which is no error.
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

// Runs f(unit, scratch) for every unit. Threads take the next one when they are free; the order changes no result.
template <class F>
void run_units(int64_t units, int64_t scratch_bytes, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), units);
  // Once per call: the page faults of fresh memory would cost more than a tile's arithmetic.
  const at::Tensor scratch = prefer_huge_pages(at::empty({threads, scratch_bytes}, at::kByte));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i; (i = next.fetch_add(1)) < units;) f(i, static_cast<char*>(scratch.data_ptr()) + t * scratch_bytes);
  });
}

// Positions, heads of a group and dimensions are 32-bit in the kernels, and padded.
void check_limits(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() - 64;
  const auto check = [&](const char* name, const at::Tensor& tensor, int64_t size, const char* what) {
    TORCH_CHECK_VALUE(size <= kMax, name, " must have at most ", kMax, " ", what, ", but has shape ", tensor.sizes());
  };
  check("query", query, query.size(-2), "positions");
  check("key", key, key.size(-2), "positions");
  check("query", query, query.size(-1), "dimensions per head");
  check("value", value, value.size(-1), "dimensions per head");
  check("query", query, query.size(-3) / key.size(-3), "heads per head of key");
}

// The kernels read a bias of the query's dtype, or float32 beside 16-bit types.
at::Tensor readable_bias(const OptionalTensor& bias, const at::Tensor& query) {
  const at::Tensor b = with_dense_rows(tensor_of(bias));
  return b.defined() && query.scalar_type() == at::kDouble ? b.to(at::kDouble) : b;
}

ForwardResult forward_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                          std::optional<double> scale, c10::string_view masked_rows) {
  check_forward<int64_t>(query, key, value, gate, bias, mask, masked_rows);
  ForwardResult result = empty_forward<int64_t>(query, value);
  auto& [out, lse, row_max, row_sum] = result;
  prefer_huge_pages(out);
  if (lse.numel() == 0) return result;
  if (key.size(-2) == 0) {
    out.zero_(), row_max.zero_(), row_sum.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
    return result;
  }
  check_limits(query, key, value);
  Operands o;
  o.query = with_contiguous_rows(query), o.key = with_contiguous_rows(key), o.value = with_contiguous_rows(value);
  o.gate = with_dense_rows(tensor_of(gate)), o.bias = readable_bias(bias, query), o.mask = tensor_of(mask);
  o.lse = lse, o.row_max = row_max, o.row_sum = row_sum;
  // Kernels store rows of dimensions; a result whose head_dim is not innermost is copied into place.
  o.out = with_contiguous_rows(out);
  const Problem p = describe(o, scale, masked_rows);

  const CpuKernels& kernels = cpu_kernels();
  const ForwardSchedule schedule(p, kernels.block(p), lse.element_size(), at::get_num_threads());
  run_units(schedule.units(p), kernels.forward_scratch(p, schedule.max_lanes),
            [&](int64_t i, char* scratch) { kernels.forward(p, schedule.unit(p, i), schedule.max_lanes, scratch); });
  if (!o.out.is_same(out)) out.copy_(o.out);
  return result;
}

// Whether a gate's gradient has its own element, or its own headwise one, for every query: the kernels write that.
bool per_query(const at::Tensor& d_gate, const at::Tensor& out) {
  return d_gate.dim() == out.dim() && d_gate.sizes().slice(0, out.dim() - 1) == out.sizes().slice(0, out.dim() - 1);
}

Gradients backward_cpu(const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
                       const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                       const OptionalTensor& bias, const OptionalTensor& mask, const at::Tensor& out,
                       const at::Tensor& row_max, const at::Tensor& row_sum, std::optional<double> scale,
                       c10::string_view masked_rows, std::array<bool, 5> grad_mask) {
  check_backward<int64_t>(grad_out, grad_lse, query, key, value, gate, bias, mask, out, row_max, row_sum, masked_rows);
  Gradients result = empty_gradients<int64_t>(query, key, value, gate, bias, grad_mask);
  auto& [d_query, d_key, d_value, d_gate, d_bias] = result;
  for (const at::Tensor* t : {&d_query, &d_key, &d_value, &d_gate, &d_bias}) prefer_huge_pages(*t);
  if (row_sum.numel() == 0 || key.size(-2) == 0) {
    for (at::Tensor* t : {&d_query, &d_key, &d_value, &d_gate, &d_bias})
      if (t->defined()) t->zero_();
    return result;
  }
  check_limits(query, key, value);
  Operands o;
  o.query = with_contiguous_rows(query), o.key = with_contiguous_rows(key), o.value = with_contiguous_rows(value);
  o.gate = with_dense_rows(tensor_of(gate)), o.bias = readable_bias(bias, query), o.mask = tensor_of(mask);
  o.out = with_contiguous_rows(out), o.row_max = row_max.contiguous(), o.row_sum = row_sum.contiguous();
  o.grad_out = with_contiguous_rows(tensor_of(grad_out));
  o.grad_lse = tensor_of(grad_lse);
  o.d_query = with_contiguous_rows(d_query), o.d_key = with_contiguous_rows(d_key),
  o.d_value = with_contiguous_rows(d_value);
  // A gate that is broadcast otherwise than over the head's dimensions gets its gradient from a full one.
  const bool sum_gate = d_gate.defined() && !per_query(d_gate, out);
  o.d_gate = sum_gate ? at::empty(out.sizes(), out.options()) : with_dense_rows(d_gate);
  Problem p = describe(o, scale, masked_rows);

  const CpuKernels& kernels = cpu_kernels();
  const BackwardSchedule schedule(p, d_bias.defined(), kernels.block(p), row_sum.element_size(), at::get_num_threads());
  // Slices of d_bias: one per group of rows, and per key/value head where the heads share a bias.
  at::Tensor partials;
  int64_t slices = 1;
  bool shared_heads = false;
  if (d_bias.defined()) {
    shared_heads = d_bias.dim() < 3 || d_bias.size(-3) == 1;
    slices = schedule.row_groups * (shared_heads ? head_units(p) : 1);
    if (slices == 1 && d_bias.scalar_type() == row_sum.scalar_type()) {
      o.d_bias = d_bias;
    } else {
      auto sizes = d_bias.sizes().vec();
      sizes.insert(sizes.begin(), slices);
      partials = prefer_huge_pages(at::empty(sizes, row_sum.options()));
      o.d_bias = partials[0];
    }
    p = describe(o, scale, masked_rows);
    if (!d_bias_is_stored(p)) (partials.defined() ? partials : d_bias).zero_();
  }
  const int64_t slice_elements = d_bias.defined() ? d_bias.numel() : 0;
  run_units(schedule.units(p), kernels.backward_scratch(p, schedule.max_lanes, schedule.rows_per_group),
            [&](int64_t i, char* scratch) {
              BackwardUnitOfWork unit = schedule.unit(p, i);
              const int64_t group = unit.row_begin / schedule.rows_per_group;
              unit.partial = (shared_heads ? group * head_units(p) + unit.kv_head : group) * slice_elements;
              kernels.backward(p, unit, schedule.max_lanes, schedule.rows_per_group, scratch);
            });
  if (partials.defined()) ordered_sum(partials, d_bias);
  if (sum_gate) ordered_sum(broadcast_dims_first(o.d_gate, d_gate.sizes()), d_gate);
  const auto finish = [](at::Tensor& to, const at::Tensor& from) {
    if (to.defined() && !to.is_same(from)) to.copy_(from);
  };
  finish(d_query, o.d_query), finish(d_key, o.d_key), finish(d_value, o.d_value);
  if (!sum_gate) finish(d_gate, o.d_gate);
  return result;
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, CPU, m) {
  m.impl("_gated_attention_forward", TORCH_FN(torch_gated_attn::forward_cpu));
  m.impl("_gated_attention_backward", TORCH_FN(torch_gated_attn::backward_cpu));
}
