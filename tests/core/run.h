// SPDX-License-Identifier: BSD-3-Clause
//
// Runs a drawn call as the launcher does, on threads of the test's own.
#pragma once

#include <atomic>
#include <thread>

#include "call.h"

namespace core_test {

using torch_gated_attn::CpuKernels;

// f(unit, scratch) for every unit; threads take the next one when they are free.
template <class F>
void run_units(int64_t units, int64_t scratch_bytes, int threads, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const Scratch scratch(scratch_bytes);
    for (int64_t i; (i = next.fetch_add(1)) < units;) f(i, scratch.data());
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
}

inline void run_forward(Call& c, const CpuKernels& kernels, int threads) {
  Problem& p = c.p;
  const torch_gated_attn::ForwardSchedule schedule(p, kernels.block(p), bytes_of(c.lse.type), threads);
  run_units(schedule.units(p), kernels.forward_scratch(p, schedule.max_lanes), threads,
            [&](int64_t i, char* scratch) { kernels.forward(p, schedule.unit(p, i), schedule.max_lanes, scratch); });
}

// Leaves the sum of the slices of d_bias, in order, in c.d_bias.
inline void run_backward(Call& c, const CpuKernels& kernels, int threads) {
  Problem p = c.p;
  p.grad_out = c.grad_out.view, p.grad_lse = c.grad_lse.view;
  p.d_query = c.d_query.view, p.d_key = c.d_key.view, p.d_value = c.d_value.view, p.d_gate = c.d_gate.view;
  const torch_gated_attn::BackwardSchedule schedule(p, static_cast<bool>(c.d_bias), kernels.block(p), bytes_of(c.lse.type),
                                                    threads);
  std::unique_ptr<Guarded> partials;
  int64_t slices = 1;
  const size_t slice_bytes = static_cast<size_t>(c.d_bias.elements) * bytes_of(c.d_bias.type);
  if (c.d_bias) {
    slices = schedule.row_groups * (c.bias_heads_shared ? torch_gated_attn::head_units(p) : 1);
    partials = std::make_unique<Guarded>(slice_bytes * static_cast<size_t>(slices), true);
    p.d_bias = c.d_bias.view;
    p.d_bias.data = partials->data();
    const bool stored = torch_gated_attn::d_bias_is_stored(p);
    std::memset(p.d_bias.data, stored ? 0xff : 0, slice_bytes * static_cast<size_t>(slices));
  }
  run_units(schedule.units(p), kernels.backward_scratch(p, schedule.max_lanes, schedule.rows_per_group), threads,
            [&](int64_t i, char* scratch) {
              auto unit = schedule.unit(p, i);
              const int64_t group = unit.row_begin / schedule.rows_per_group;
              unit.partial = (c.bias_heads_shared ? group * torch_gated_attn::head_units(p) + unit.kv_head : group) *
                             c.d_bias.elements;
              kernels.backward(p, unit, schedule.max_lanes, schedule.rows_per_group, scratch);
            });
  if (!c.d_bias) return;
  for (int64_t i = 0; i < c.d_bias.elements; ++i) {
    double sum = 0;
    for (int64_t s = 0; s < slices; ++s) sum += get(c.d_bias.type, p.d_bias.data, s * c.d_bias.elements + i);
    if (c.d_bias.type == DType::kFloat64)
      static_cast<double*>(c.d_bias.view.data)[i] = sum;
    else
      static_cast<float*>(c.d_bias.view.data)[i] = static_cast<float>(sum);
  }
}

}  // namespace core_test
