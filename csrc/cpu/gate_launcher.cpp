// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU kernels of gate_output: PyTorch's iterator orders, merges and divides the dimensions, the instruction set's
// function (gate_output.h) does a line. Each element's arithmetic is the same wherever a line begins, so the result does
// not depend on the number of threads.
#include <ATen/TensorIterator.h>
#include <torch/library.h>

#include "../checks.h"
#include "../describe.h"
#include "dispatch.h"
#include "ordered_sum.h"

namespace torch_gated_attn {
namespace {

at::Tensor gate_output_cpu(const at::Tensor& out, const at::Tensor& gate) {
  check_gate_output<int64_t>(out, gate);
  at::Tensor result = empty_in_order_of<int64_t>(out, out.sizes());
  auto iterator = at::TensorIteratorConfig()
                      .resize_outputs(false)
                      .add_output(result)
                      .add_const_input(out)
                      .add_const_input(gate)
                      .build();
  const auto line = cpu_kernels().gate_output;
  const DType dtype = kernel_dtype(out.scalar_type());
  iterator.for_each([&](char** data, const int64_t* strides, int64_t n) { line(dtype, data, strides, n); });
  return result;
}

std::tuple<at::Tensor, at::Tensor> gate_output_backward_cpu(const at::Tensor& grad, const at::Tensor& out,
                                                            const at::Tensor& gate, std::array<bool, 2> grad_mask) {
  check_gate_output_backward<int64_t>(grad, out, gate);
  auto result = empty_gate_gradients<int64_t>(out, gate, grad_mask);
  const auto& [d_out, d_gate] = result;
  // The kernel writes both; one that nobody asked for, or whose gate is broadcast, goes to memory of its own.
  const bool sum_gate = d_gate.defined() && d_gate.sizes() != out.sizes();
  const at::Tensor full_d_out = d_out.defined() ? d_out : empty_in_order_of<int64_t>(out, out.sizes());
  const at::Tensor full_d_gate = d_gate.defined() && !sum_gate ? d_gate : empty_in_order_of<int64_t>(out, out.sizes());
  auto iterator = at::TensorIteratorConfig()
                      .resize_outputs(false)
                      .add_output(full_d_out)
                      .add_output(full_d_gate)
                      .add_const_input(grad)
                      .add_const_input(out)
                      .add_const_input(gate)
                      .build();
  const auto line = cpu_kernels().gate_output_backward;
  const DType dtype = kernel_dtype(out.scalar_type());
  iterator.for_each([&](char** data, const int64_t* strides, int64_t n) { line(dtype, data, strides, n); });
  if (sum_gate) ordered_sum(broadcast_dims_first(full_d_gate, d_gate.sizes()), d_gate);
  return result;
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, CPU, m) {
  m.impl("gate_output", TORCH_FN(torch_gated_attn::gate_output_cpu));
  m.impl("_gate_output_backward", TORCH_FN(torch_gated_attn::gate_output_backward_cpu));
}
