// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "params.h"

namespace torch_gated_attn::cuda {

// Kernel arguments of a Problem: batch dimensions of size 1 disappear, and the innermost one over which the bias is
// broadcast becomes the rows of a slab.
AttentionParams make_params(const Problem& problem);

// An operand that make_params does not list (gradients), walked the same way.
Operand make_operand(const Problem& problem, const View& view);

}  // namespace torch_gated_attn::cuda
