// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU kernels of the dispatcher: checks, allocation, threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#include "../operands.h"
#include "dispatch.h"
#include "ordered_sum.h"
#include "schedule.h"

namespace torch_gated_attn {
namespace {

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

ForwardResult forward_cpu(const Arguments& a) {
  PreparedForward call(a);
  prefer_huge_pages(std::get<0>(call.result));
  if (call.done) return call.finish();
  if (!call.problem) return call.by_formula(a);
  const Problem& p = *call.problem;
  const CpuKernels& kernels = cpu_kernels();
  const ForwardSchedule schedule(p, kernels.block(p), call.operands.lse.element_size(), at::get_num_threads());
  run_units(schedule.units(p), kernels.forward_scratch(p, schedule.max_lanes),
            [&](int64_t i, char* scratch) { kernels.forward(p, schedule.unit(p, i), schedule.max_lanes, scratch); });
  return call.finish();
}

Gradients backward_cpu(const BackwardArguments& a) {
  PreparedBackward call(a, /*wide_gate_sums=*/false);
  std::apply([](const auto&... gradient) { (prefer_huge_pages(gradient), ...); }, call.result);
  if (call.done) return call.finish();
  if (!call.problem) return call.by_formula(a);
  Problem p = *call.problem;
  const CpuKernels& kernels = cpu_kernels();
  const at::Tensor& d_bias = call.operands.d_bias;
  const BackwardSchedule schedule(p, d_bias.defined(), kernels.block(p), a.row_sum.element_size(), at::get_num_threads());
  // Slices of d_bias: one per group of rows, and per key/value head where the heads share a bias.
  at::Tensor partials;
  bool shared_heads = false;
  if (d_bias.defined()) {
    shared_heads = d_bias.dim() < 3 || d_bias.size(-3) == 1;
    const int64_t slices = schedule.row_groups * (shared_heads ? head_units(p) : 1);
    if (slices > 1 || d_bias.scalar_type() != a.row_sum.scalar_type()) {
      auto sizes = d_bias.sizes().vec();
      sizes.insert(sizes.begin(), slices);
      partials = prefer_huge_pages(at::empty(sizes, a.row_sum.options()));
      p.d_bias.data = partials.data_ptr();  // d_bias is contiguous, so the strides are its own
    }
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
  return call.finish();
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, CPU, m) {
  using namespace torch_gated_attn;
  m.impl("_gated_attention_forward", TORCH_FN(Packed<forward_cpu>::call));
  m.impl("_gated_attention_backward", TORCH_FN(Packed<backward_cpu>::call));
}
