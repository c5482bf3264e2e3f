// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU kernels of the dispatcher: checks, allocation, threads.
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
#include "threads.h"

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
  parallel_for(threads, [&](int64_t begin, int64_t end) {
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
  const int64_t scratch_bytes = kernels.forward_scratch(p, schedule.max_lanes), units = schedule.units(p);
  const int64_t state = kernels.forward_state(p, schedule.max_lanes), stride = schedule.state_stride(p, state);
  const at::Tensor states = at::empty({schedule.parts > 1 ? schedule.parts * stride : 0}, at::kByte);
  const auto unit = [&](int64_t i) { return schedule.unit(p, i, static_cast<char*>(states.data_ptr()), state); };
  run_units(units * schedule.parts, scratch_bytes,
            [&](int64_t i, char* scratch) { kernels.forward(p, unit(i), schedule.max_lanes, scratch); });
  if (schedule.parts > 1) {
    run_units(units, scratch_bytes, [&](int64_t i, char* scratch) {
      kernels.forward_merge(p, unit(i), schedule.max_lanes, schedule.parts, stride, scratch);
    });
  }
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
  const BackwardSchedule schedule(p, kernels.block(p), a.row_sum.element_size(), at::get_num_threads());
  at::Tensor partials;
  if (d_bias.defined()) {
    if (schedule.slices() > 1 || d_bias.scalar_type() != a.row_sum.scalar_type()) {
      auto sizes = d_bias.sizes().vec();
      sizes.insert(sizes.begin(), schedule.slices());
      partials = prefer_huge_pages(at::empty(sizes, a.row_sum.options()));
      p.d_bias.data = partials.data_ptr();  // d_bias is contiguous, so the strides are its own
    }
    if (!d_bias_is_stored(p)) (partials.defined() ? partials : d_bias).zero_();
  }
  const int64_t slice = d_bias.defined() ? d_bias.numel() : 0, units = schedule.units(p);
  // Parts of the gradients of key and value, [part][unit][row][K][dimension], where the queries are shared out.
  const auto part_tensor = [&](const View& wanted, int64_t dim) {
    const bool needed = schedule.parts > 1 && wanted.data;
    return prefer_huge_pages(
        at::empty({needed ? schedule.parts : 0, schedule.part_rows(p), p.k_len, dim}, a.row_sum.options()));
  };
  const at::Tensor d_key = part_tensor(p.d_key, p.head_dim), d_value = part_tensor(p.d_value, p.value_dim);
  const int64_t k_row = p.k_len * p.head_dim * d_key.element_size(), v_row = p.k_len * p.value_dim * d_value.element_size();
  const auto unit = [&](int64_t i) {
    return schedule.unit(p, i, slice, static_cast<char*>(d_key.data_ptr()), k_row, static_cast<char*>(d_value.data_ptr()),
                         v_row);
  };
  run_units(units * schedule.parts, kernels.backward_scratch(p, schedule.max_lanes, schedule.rows_per_group),
            [&](int64_t i, char* scratch) {
              kernels.backward(p, unit(i), schedule.max_lanes, schedule.rows_per_group, scratch);
            });
  if (schedule.parts > 1) {
    const int64_t rows = schedule.part_rows(p), last = (schedule.parts - 1) * units;  // the unit of part 0 comes last
    run_units(units, 0, [&](int64_t i, char*) {
      kernels.backward_merge(p, unit(last + i), schedule.parts, rows * k_row, rows * v_row);
    });
  }
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
