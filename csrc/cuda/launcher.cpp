// SPDX-License-Identifier: BSD-3-Clause
//
// The CUDA kernels of the dispatcher: checks, allocation, the choice of kernel. Everything is enqueued on the current
// stream of the tensors' device; nothing waits for the device, and memory comes from at::empty only, so that CUDA graphs
// can capture it.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <mutex>
#include <string>
#include <unordered_set>

#include "../operands.h"
#include "run.h"

namespace torch_gated_attn {
namespace {

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

cuda::Choice too_many_dims() {
  cuda::Choice choice;
  choice.kernel = cuda::Kernel::kComposite, choice.reason = kTooManyDims;
  return choice;
}

ForwardResult forward_cuda(const Arguments& a) {
  const c10::cuda::CUDAGuard guard(a.query.device());
  PreparedForward call(a);
  if (call.done) return call.finish();
  std::vector<at::Tensor> scratch;
  const cuda::Device device = current_device(a.query, scratch);
  const cuda::Choice choice = call.problem ? cuda::choose_forward(*call.problem, device.arch) : too_many_dims();
  if (choice.kernel == cuda::Kernel::kComposite) {
    warn_once(choice.reason);
    return call.by_formula(a);
  }
  cuda::run_forward(*call.problem, choice, device);
  return call.finish();
}

Gradients backward_cuda(const BackwardArguments& a) {
  const c10::cuda::CUDAGuard guard(a.query.device());
  PreparedBackward call(a, /*wide_gate_sums=*/true);
  if (call.done) return call.finish();
  std::vector<at::Tensor> scratch;
  const cuda::Device device = current_device(a.query, scratch);
  const cuda::Choice choice = call.problem ? cuda::choose_backward(*call.problem, device.arch) : too_many_dims();
  if (choice.kernel == cuda::Kernel::kComposite) {
    warn_once(choice.reason);
    return call.by_formula(a);
  }
  cuda::run_backward(*call.problem, choice, device, call.sums_gate);
  return call.finish();
}

}  // namespace
}  // namespace torch_gated_attn

TORCH_LIBRARY_IMPL(torch_gated_attn, CUDA, m) {
  using namespace torch_gated_attn;
  m.impl("_gated_attention_forward", TORCH_FN(Packed<forward_cuda>::call));
  m.impl("_gated_attention_backward", TORCH_FN(Packed<backward_cuda>::call));
}
