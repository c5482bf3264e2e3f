// SPDX-License-Identifier: BSD-3-Clause
//
// Sums whose order, and so every bit, does not depend on the number of threads (at::sum splits long sums by thread).
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_gated_attn {

// out = sum over the leading dimension of `parts`, [P, out's shape], first part first; in float (double for double),
// rounded once to out's type.
void ordered_sum(const at::Tensor& parts, const at::Tensor& out);

// `full` with the dimensions that a tensor of `sizes` (right-aligned) broadcasts moved to the front and merged.
at::Tensor broadcast_dims_first(const at::Tensor& full, at::IntArrayRef sizes);

}  // namespace torch_gated_attn
