// SPDX-License-Identifier: BSD-3-Clause
//
// The CUDA kernels of the dispatcher: checks, allocation, the choice of kernel. Everything is enqueued on the current
// stream of the tensors' device; nothing waits for the device, and memory comes from at::empty only, so that CUDA graphs
// can capture it.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <limits>
#include <mutex>
#include <string>
#include <unordered_set>

#include "../checks.h"
#include "../describe.h"
#include "run.h"

namespace torch_gated_attn {
namespace {

at::Tensor tensor_of(const OptionalTensor& t) { return given(t) ? *t : at::Tensor(); }

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// The device of `like` and scratch on it; `scratch` keeps what is handed out until the call has enqueued its kernels.
cuda::Device current_device(const at::Tensor& like, std::vector<at::Tensor>& scratch) {
  const int index = like.device().index();
  cuda::Device device;
  device.arch = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, index) +
                device_attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device.multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, index);
  device.stream = c10::cuda::getCurrentCUDAStream(index).stream();
  const auto options = like.options().dtype(at::kByte);
  device.allocate = [&scratch, options](size_t bytes) {
    scratch.push_back(at::empty({static_cast<int64_t>(bytes)}, options));
    return scratch.back().data_ptr();
  };
  return device;
}

void check_limits(const Problem& p) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() - 4096;  // positions are 32-bit, and padded
  TORCH_CHECK_VALUE(p.q_len <= kMax && p.k_len <= kMax, "query and key must have at most ", kMax, " positions, but have ",
                    p.q_len, " and ", p.k_len);
}

// The kernels read a bias of the query's dtype, or float32 beside 16-bit types.
at::Tensor readable_bias(const OptionalTensor& bias, const at::Tensor& query) {
  const at::Tensor b = tensor_of(bias);
  return b.defined() && query.scalar_type() == at::kDouble ? b.to(at::kDouble) : b;
}

Operands forward_operands(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask) {
  Operands o;
  o.query = with_contiguous_rows(query), o.key = with_contiguous_rows(key), o.value = with_contiguous_rows(value);
  o.gate = with_dense_rows(tensor_of(gate)), o.bias = readable_bias(bias, query), o.mask = tensor_of(mask);
  return o;
}

// What no fused kernel takes never runs the composite formula silently: one warning for every reason, which the backward
// shares with its forward.
void warn_once(const std::string& reason) {
  static std::mutex mutex;
  static std::unordered_set<std::string> warned;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!warned.insert(reason).second && !c10::WarningUtils::get_warnAlways()) return;
  }
  TORCH_WARN("torch_gated_attn: ", reason);
}

ForwardResult forward_cuda(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& mask,
                           std::optional<double> scale, c10::string_view masked_rows) {
  check_forward<int64_t>(query, key, value, gate, bias, mask, masked_rows);
  const c10::cuda::CUDAGuard guard(query.device());
  ForwardResult result = empty_forward<int64_t>(query, value);
  auto& [out, lse, row_max, row_sum] = result;
  if (lse.numel() == 0) return result;
  Operands o = forward_operands(query, key, value, gate, bias, mask);
  o.lse = lse, o.row_max = row_max, o.row_sum = row_sum;
  // Kernels store rows of dimensions; a result whose head_dim is not innermost is copied into place.
  o.out = with_contiguous_rows(out);
  const Problem p = describe(o, scale, masked_rows);
  check_limits(p);
  std::vector<at::Tensor> scratch;
  const cuda::Device device = current_device(query, scratch);
  const cuda::Choice choice = cuda::choose_forward(p, device.arch);
  if (choice.kernel == cuda::Kernel::kComposite) {
    warn_once(choice.reason);
    const auto [y, l, m, s] = forward_composite(query, key, value, gate, bias, mask, scale, masked_rows);
    out.copy_(y), lse.copy_(l), row_max.copy_(m), row_sum.copy_(s);
    return result;
  }
  cuda::run_forward(p, choice, device);
  if (!o.out.is_same(out)) out.copy_(o.out);
  return result;
}

// Whether a gate's gradient has its own element, or its own headwise one, for every query: the kernels write that.
bool per_query(const at::Tensor& d_gate, const at::Tensor& out) {
  return d_gate.dim() == out.dim() && d_gate.sizes().slice(0, out.dim() - 1) == out.sizes().slice(0, out.dim() - 1);
}

Gradients backward_cuda(const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
                        const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate,
                        const OptionalTensor& bias, const OptionalTensor& mask, const at::Tensor& out,
                        const at::Tensor& row_max, const at::Tensor& row_sum, std::optional<double> scale,
                        c10::string_view masked_rows, std::array<bool, 5> grad_mask) {
  check_backward<int64_t>(grad_out, grad_lse, query, key, value, gate, bias, mask, out, row_max, row_sum, masked_rows);
  const c10::cuda::CUDAGuard guard(query.device());
  Gradients result = empty_gradients<int64_t>(query, key, value, gate, bias, grad_mask);
  auto& [d_query, d_key, d_value, d_gate, d_bias] = result;
  if (row_sum.numel() == 0 || key.size(-2) == 0) {
    for (at::Tensor* t : {&d_query, &d_key, &d_value, &d_gate, &d_bias})
      if (t->defined()) t->zero_();
    return result;
  }
  Operands o = forward_operands(query, key, value, gate, bias, mask);
  o.out = with_contiguous_rows(out), o.row_max = row_max, o.row_sum = row_sum;
  o.grad_out = tensor_of(grad_out), o.grad_lse = tensor_of(grad_lse);
  o.d_query = with_contiguous_rows(d_query), o.d_key = with_contiguous_rows(d_key),
  o.d_value = with_contiguous_rows(d_value);
  // A gate that is broadcast otherwise than over the head's dimensions gets its gradient from a full one, in float32.
  const bool sum_gate = d_gate.defined() && !per_query(d_gate, out);
  if (sum_gate) {
    auto sizes = out.sizes().vec();
    if (d_gate.dim() == 0 || d_gate.size(-1) == 1) sizes.back() = 1;
    o.d_gate = at::empty(sizes, row_sum.options());
  } else {
    o.d_gate = with_dense_rows(d_gate);
  }
  // float64 has read its bias as float64.
  const bool cast_bias = d_bias.defined() && d_bias.scalar_type() != o.bias.scalar_type();
  o.d_bias = cast_bias ? at::empty(d_bias.sizes(), o.bias.options()) : d_bias;
  const Problem p = describe(o, scale, masked_rows);
  check_limits(p);
  std::vector<at::Tensor> scratch;
  const cuda::Device device = current_device(query, scratch);
  const cuda::Choice choice = cuda::choose_backward(p, device.arch);
  if (choice.kernel == cuda::Kernel::kComposite) {
    warn_once(choice.reason);
    return backward_composite(grad_out, grad_lse, query, key, value, gate, bias, mask, scale, masked_rows, grad_mask);
  }
  cuda::run_backward(p, choice, device, sum_gate);
  const auto finish = [](at::Tensor& to, const at::Tensor& from) {
    if (to.defined() && !to.is_same(from)) to.copy_(from);
  };
  finish(d_query, o.d_query), finish(d_key, o.d_key), finish(d_value, o.d_value), finish(d_bias, o.d_bias);
  if (sum_gate) {
    d_gate.copy_(o.d_gate.sum_to_size(d_gate.sizes()));
  } else {
    finish(d_gate, o.d_gate);
  }
  return result;
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, CUDA, m) {
  m.impl("_gated_attention_forward", TORCH_FN(torch_gated_attn::forward_cuda));
  m.impl("_gated_attention_backward", TORCH_FN(torch_gated_attn::backward_cuda));
}
