// SPDX-License-Identifier: BSD-3-Clause
#include "aligned_bias.h"
#include "dispatch.h"
#include "kernels.h"
#include "make_params.h"
#include "run.h"

namespace torch_gated_attn::cuda {

namespace {

template <class T>
void run_plain(const Problem& problem, const Choice& choice, const Device& device) {
  PlainParams<T> p;
  static_cast<AttentionParams&>(p) = make_params(problem);
  p.exact_scale = problem.scale;
  launch_plain_forward<T>(p, choice.head_dim, device.stream);
}

}  // namespace

void run_forward(const Problem& problem, const Choice& choice, const Device& device) {
  if (choice.kernel == Kernel::kPlain) {
    return problem.dtype == DType::kFloat64 ? run_plain<double>(problem, choice, device)
                                            : run_plain<float>(problem, choice, device);
  }
  AttentionParams p = make_params(problem);
  p.aligned = choice.aligned;
  if (choice.copy_bias) {
    p.bias = copy_bias(p, device);
  }
  dispatch_tensor_core(problem.dtype, choice.head_dim, [&](auto type, auto dim) {
    launch_forward<type.value, dim.value>(p, choice.access, choice.share_bias, device.stream);
  });
}

}  // namespace torch_gated_attn::cuda
