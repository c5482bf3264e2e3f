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
  const int64_t scratch_bytes = kernels.forward_scratch(p, schedule.max_lanes), units = schedule.units(p);
  const int64_t state = kernels.forward_state(p, schedule.max_lanes), stride = schedule.state_stride(p, state);
  const Scratch states(schedule.parts > 1 ? schedule.parts * stride : 0);
  const auto unit = [&](int64_t i) { return schedule.unit(p, i, states.data(), state); };
  run_units(units * schedule.parts, scratch_bytes, threads,
            [&](int64_t i, char* scratch) { kernels.forward(p, unit(i), schedule.max_lanes, scratch); });
  if (schedule.parts == 1) return;
  run_units(units, scratch_bytes, threads, [&](int64_t i, char* scratch) {
    kernels.forward_merge(p, unit(i), schedule.max_lanes, schedule.parts, stride, scratch);
  });
}

// Leaves the sum of the slices of d_bias, in order, in c.d_bias.
inline void run_backward(Call& c, const CpuKernels& kernels, int threads) {
  Problem p = c.p;
  p.grad_out = c.grad_out.view, p.grad_lse = c.grad_lse.view;
  p.d_query = c.d_query.view, p.d_key = c.d_key.view, p.d_value = c.d_value.view, p.d_gate = c.d_gate.view;
  p.d_bias = c.d_bias.view;
  const torch_gated_attn::BackwardSchedule schedule(p, kernels.block(p), bytes_of(c.lse.type), threads);
  std::unique_ptr<Guarded> partials;
  const int64_t slices = schedule.slices(), units = schedule.units(p), rows = schedule.part_rows(p);
  const size_t slice_bytes = static_cast<size_t>(c.d_bias.elements) * bytes_of(c.d_bias.type);
  if (c.d_bias) {
    partials = std::make_unique<Guarded>(slice_bytes * static_cast<size_t>(slices), true);
    p.d_bias.data = partials->data();
    const bool stored = torch_gated_attn::d_bias_is_stored(p);
    std::memset(p.d_bias.data, stored ? 0xff : 0, slice_bytes * static_cast<size_t>(slices));
  }
  const int64_t k_row = p.k_len * p.head_dim * static_cast<int64_t>(bytes_of(c.lse.type));
  const int64_t v_row = p.k_len * p.value_dim * static_cast<int64_t>(bytes_of(c.lse.type));
  const int64_t part_rows = schedule.parts > 1 ? schedule.parts * rows : 0;
  const Scratch d_key(part_rows * k_row), d_value(part_rows * v_row);
  const auto unit = [&](int64_t i) {
    return schedule.unit(p, i, c.d_bias.elements, d_key.data(), k_row, d_value.data(), v_row);
  };
  run_units(units * schedule.parts, kernels.backward_scratch(p, schedule.max_lanes, schedule.rows_per_group), threads,
            [&](int64_t i, char* scratch) {
              kernels.backward(p, unit(i), schedule.max_lanes, schedule.rows_per_group, scratch);
            });
  if (schedule.parts > 1) {
    const int64_t last = (schedule.parts - 1) * units;
    run_units(units, 0, threads, [&](int64_t i, char*) {
      kernels.backward_merge(p, unit(last + i), schedule.parts, rows * k_row, rows * v_row);
    });
  }
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
