// SPDX-License-Identifier: BSD-3-Clause
//
// From tensors to the torch-free Problem, for the launchers of every device. Arguments have passed checks.h.
#pragma once

#include "arguments.h"
#include "problem.h"

namespace torch_gated_attn {

// The tensors of one call; undefined = absent.
struct Operands {
  at::Tensor query, key, value, gate, bias, mask, out, lse, row_max, row_sum;
  at::Tensor grad_out, grad_lse, key_lengths, d_query, d_key, d_value, d_gate, d_bias;
};

DType kernel_dtype(at::ScalarType dtype);

// Merges batch dimensions and orders them so that those the bias (and d_bias) does not vary over come last.
// None where more than kMaxBatchDims remain.
std::optional<Problem> describe(const Operands& operands, const Arguments& a);

// `tensor` with unit stride in its last dimension (or a broadcast one, stride 0): itself, or a dense copy of its distinct
// elements, expanded to its shape. Undefined stays undefined.
at::Tensor with_dense_rows(const at::Tensor& tensor);
// The same with unit stride only.
at::Tensor with_contiguous_rows(const at::Tensor& tensor);

}  // namespace torch_gated_attn
