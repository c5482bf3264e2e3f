// SPDX-License-Identifier: BSD-3-Clause
//
// What computes the core of a call: the fused operator, or PyTorch's own attention followed by one gating pass. Asked by
// the public operator, so that every way to it agrees, and by explain().
#pragma once

#include <c10/core/DeviceType.h>

#include "arguments.h"

namespace torch_gated_attn {

enum class Core { kFused, kSdpa };
struct Route {
  Core core;
  const char* reason;
};

// False for the calls that are always fused, which then need no second look.
bool may_leave_fused(const Arguments& a);

// `device`: as if the tensors were there. The arguments have passed check_forward.
Route choose_core(const Arguments& a, c10::DeviceType device, bool bias_requires_grad);

// The call by PyTorch's attention, for what choose_core lets pass.
at::Tensor sdpa(const Arguments& a);

}  // namespace torch_gated_attn
