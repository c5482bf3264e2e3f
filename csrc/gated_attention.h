// SPDX-License-Identifier: BSD-3-Clause
//
// Public C++ interface of torch_gated_attn: gated attention as PyTorch operators.
//
// For every batch index, head h and query i:
//
//     s_ij  = scale * <q_i, k_j> + bias_ij      for the keys j with mask_ij (true = attend)
//     p_ij  = softmax_j(s_ij)
//     out_i = (sum_j p_ij v_j) * sigmoid(gate_i)
//     lse_i = log sum_j exp(s_ij)
//
//   query [*, H, Q, D]   key [*, Hkv, K, D]   value [*, Hkv, K, Dv]     Hkv divides H
//   gate  broadcastable to [*, H, Q, Dv], raw logits; none = no gating
//   bias  broadcastable to [*, H, Q, K], query's dtype or float32
//   mask  broadcastable to [*, H, Q, K], bool
//   key_lengths  [*], int32 or int64: leading keys of each batch entry that exist
//   out   [*, H, Q, Dv], dimensions in the memory order of query      lse [*, H, Q], float32 (float64 for float64)
//
// The formula is the attention core of AlphaFold 2 (Jumper et al. 2021, supplementary algorithm 7) with an optional gate.
// Every function here goes through the dispatcher: autograd, autocast and torch.compile see it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <array>
#include <optional>
#include <tuple>

#define TORCH_GATED_ATTN_API __attribute__((visibility("default")))

namespace torch_gated_attn {

using OptionalTensor = std::optional<at::Tensor>;

// Query i stands at key position K - Q + i: with is_causal it attends to no key behind it, with a window (which needs
// is_causal) to the last `window` keys only, its own position included. Tiles in which nothing is attended are not
// computed. Rows with no attended key: masked_rows = "zero" gives 0, "mean" gives sigmoid(gate) * mean of all values.
TORCH_GATED_ATTN_API at::Tensor gated_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                                const OptionalTensor& gate = {}, const OptionalTensor& bias = {},
                                                const OptionalTensor& mask = {}, std::optional<double> scale = {},
                                                c10::string_view masked_rows = "zero", bool is_causal = false,
                                                std::optional<int64_t> window = {}, const OptionalTensor& key_lengths = {});

TORCH_GATED_ATTN_API std::tuple<at::Tensor, at::Tensor> gated_attention_with_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& gate = {},
    const OptionalTensor& bias = {}, const OptionalTensor& mask = {}, std::optional<double> scale = {},
    c10::string_view masked_rows = "zero", bool is_causal = false, std::optional<int64_t> window = {},
    const OptionalTensor& key_lengths = {});

// out * sigmoid(gate), for the result of another attention: gate is broadcastable to out. One pass over memory, forward and
// backward.
TORCH_GATED_ATTN_API at::Tensor gate_output(const at::Tensor& out, const at::Tensor& gate);
std::tuple<at::Tensor, at::Tensor> gate_output_backward(const at::Tensor& grad, const at::Tensor& out,
                                                        const at::Tensor& gate, std::array<bool, 2> grad_mask);

// What the functional ops that carry the work return (arguments.h). row_max and row_sum [*, H, Q] are private residuals of
// the backward: a shift m within a few units of the row's largest logit, in units of log2, and sum_j 2^(s_ij * log2(e) -
// m); lse follows from them.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // out, lse, row_max, row_sum
// Gradients of query, key, value, gate, bias, in this order; undefined where nobody asked.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace torch_gated_attn
