// SPDX-License-Identifier: BSD-3-Clause
//
// Every check of an argument, once: the device launchers take S = int64_t, the Meta kernels and the composite formula
// S = c10::SymInt. A message is one sentence: the argument, what is expected, what came.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "arguments.h"
#include "outputs.h"

namespace torch_gated_attn {

// The dispatcher sends tensors of other layouts elsewhere before a kernel sees them, so the public ops ask this first.
inline void check_strided(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), name, " must be a tensor, but is undefined");
  TORCH_CHECK_VALUE(!tensor.is_nested(), name, " must be a dense strided tensor, but is a nested tensor");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, " must be a dense strided tensor, but has layout ",
                    tensor.layout());
}

inline auto dtype_name(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

inline void check_dtype(const char* name, const at::Tensor& tensor, const char* owner, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must have ", owner, " ", dtype_name(dtype), ", but is ",
                   dtype_name(tensor.scalar_type()));
}

inline void check_device(const char* name, const at::Tensor& tensor, const at::Tensor& query) {
  TORCH_CHECK(tensor.device() == query.device(), name, " must be on query's device ", query.device(), ", but is on ",
              tensor.device());
}

inline void check_masked_rows(c10::string_view masked_rows) {
  TORCH_CHECK_VALUE(masked_rows == "zero" || masked_rows == "mean", "masked_rows must be \"zero\" or \"mean\", but is \"",
                    masked_rows, "\"");
}

// Right-aligned broadcasting that must not enlarge the target.
template <typename S>
void check_broadcastable(const char* name, const at::Tensor& tensor, const char* target_dims, const Sizes<S>& target) {
  const auto sizes = at::symint::sizes<S>(tensor);
  bool fits = sizes.size() <= target.size();
  for (size_t i = 1; fits && i <= sizes.size(); ++i) {
    const auto& size = sizes[sizes.size() - i];
    fits = known_equal(size, S(1)) || required_equal(size, target[target.size() - i]);
  }
  TORCH_CHECK_VALUE(fits, name, " must be broadcastable to ", target_dims, " = ", c10::ArrayRef<S>(target),
                    ", but has shape ", sizes);
}

template <typename S>
void check_shape(const char* name, const at::Tensor& tensor, const char* target_dims, const Sizes<S>& target) {
  const auto sizes = at::symint::sizes<S>(tensor);
  bool same = sizes.size() == target.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = required_equal(sizes[d], target[d]);
  TORCH_CHECK_VALUE(same, name, " must have shape ", target_dims, " = ", c10::ArrayRef<S>(target), ", but has shape ",
                    sizes);
}

// Shapes of query [*, H, Q, D], key [*, Hkv, K, D] and value [*, Hkv, K, Dv] against each other.
template <typename S>
void check_query_key_value(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  const auto q = at::symint::sizes<S>(query), k = at::symint::sizes<S>(key), v = at::symint::sizes<S>(value);
  TORCH_CHECK_VALUE(q.size() >= 3, "query must have at least 3 dimensions [*, H, Q, D], but has shape ", q);
  TORCH_CHECK_VALUE(k.size() == q.size(), "key must have as many dimensions as query of shape ", q, ", but has shape ", k);
  TORCH_CHECK_VALUE(v.size() == q.size(), "value must have as many dimensions as query of shape ", q, ", but has shape ",
                    v);
  const size_t batch_dims = q.size() - 3, head = batch_dims, length = batch_dims + 1, last = batch_dims + 2;
  for (size_t d = 0; d < batch_dims; ++d) {
    TORCH_CHECK_VALUE(required_equal(k[d], q[d]), "key must have query's batch dimensions ", q.slice(0, batch_dims),
                      ", but has shape ", k);
    TORCH_CHECK_VALUE(required_equal(v[d], q[d]), "value must have query's batch dimensions ", q.slice(0, batch_dims),
                      ", but has shape ", v);
  }
  TORCH_CHECK_VALUE(required_equal(k[last], q[last]), "key must have query's head_dim ", q[last],
                    " as its last dimension, but has shape ", k);
  TORCH_CHECK_VALUE(required_equal(v[head], k[head]), "value must have as many heads as key, ", k[head], ", but has shape ",
                    v);
  TORCH_CHECK_VALUE(required_equal(v[length], k[length]), "value must have key's length ", k[length], ", but has shape ",
                    v);
  if (known_equal(k[head], q[head])) return;
  TORCH_CHECK_VALUE(!known_equal(k[head], S(0)) && required_equal(q[head] % k[head], S(0)),
                    "key must have a number of heads that divides query's ", q[head], ", but has ", k[head]);
}

template <typename S>
void check_visibility(const Arguments& a) {
  TORCH_CHECK_VALUE(a.is_causal || !a.window, "window must be None without is_causal, but is ", a.window.value_or(0));
  TORCH_CHECK_VALUE(!a.window || *a.window >= 1, "window must be at least 1, but is ", a.window.value_or(0));
  if (!given(a.key_lengths)) return;
  const at::Tensor& lengths = *a.key_lengths;
  check_strided("key_lengths", lengths);
  TORCH_CHECK_TYPE(lengths.scalar_type() == at::kInt || lengths.scalar_type() == at::kLong,
                   "key_lengths must be int32 or int64, but is ", dtype_name(lengths.scalar_type()));
  check_device("key_lengths", lengths, a.query);
  const auto sizes = at::symint::sizes<S>(lengths), query = at::symint::sizes<S>(a.query);
  bool same = sizes.size() + 3 == query.size();
  for (size_t d = 0; same && d < sizes.size(); ++d) same = required_equal(sizes[d], query[d]);
  TORCH_CHECK_VALUE(same, "key_lengths must have query's batch dimensions ", query.slice(0, query.size() - 3),
                    ", but has shape ", sizes);
}

template <typename S>
void check_forward(const Arguments& a) {
  check_strided("query", a.query);
  const auto dtype = a.query.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "query must be float32, float64, bfloat16 or float16, but is ", dtype_name(dtype));
  const auto check_like_query = [&](const char* name, const at::Tensor& tensor) {
    check_strided(name, tensor);
    check_dtype(name, tensor, "query's dtype", dtype);
    check_device(name, tensor, a.query);
  };
  check_like_query("key", a.key);
  check_like_query("value", a.value);
  check_query_key_value<S>(a.query, a.key, a.value);
  const auto check_logits = [&](const char* name, const at::Tensor& tensor) {
    check_device(name, tensor, a.query);
    check_broadcastable<S>(name, tensor, "[*, H, Q, K]", query_sizes<S>(a.query, at::symint::size<S>(a.key, -2)));
  };
  if (given(a.gate)) {
    check_like_query("gate", *a.gate);
    check_broadcastable<S>("gate", *a.gate, "[*, H, Q, Dv]", query_sizes<S>(a.query, at::symint::size<S>(a.value, -1)));
  }
  if (given(a.bias)) {
    check_strided("bias", *a.bias);
    if (a.bias->scalar_type() != at::kFloat) check_dtype("bias", *a.bias, "float32 or query's dtype", dtype);
    check_logits("bias", *a.bias);
  }
  if (given(a.mask)) {
    check_strided("mask", *a.mask);
    TORCH_CHECK_TYPE(a.mask->scalar_type() == at::kBool, "mask must be bool (True = attend), but is ",
                     dtype_name(a.mask->scalar_type()),
                     ": pass mask > 0 for a mask of 0 and 1, bias=mask for an additive one (0 and -1e9)");
    check_logits("mask", *a.mask);
  }
  check_masked_rows(a.masked_rows);
  check_visibility<S>(a);
}

template <typename S>
void check_backward(const BackwardArguments& a) {
  check_forward<S>(a);
  const auto check_out = [&](const char* name, const at::Tensor& tensor) {
    check_strided(name, tensor);
    check_dtype(name, tensor, "query's dtype", a.query.scalar_type());
    check_device(name, tensor, a.query);
    check_shape<S>(name, tensor, "[*, H, Q, Dv]", query_sizes<S>(a.query, at::symint::size<S>(a.value, -1)));
  };
  const auto check_row = [&](const char* name, const at::Tensor& tensor) {
    check_strided(name, tensor);
    check_dtype(name, tensor, "dtype", accumulation_type(a.query.scalar_type()));
    check_device(name, tensor, a.query);
    check_shape<S>(name, tensor, "[*, H, Q]", row_sizes<S>(a.query));
  };
  if (given(a.grad_out)) check_out("grad_out", *a.grad_out);
  if (given(a.grad_lse)) check_row("grad_lse", *a.grad_lse);
  check_out("out", a.out);
  check_row("row_max", a.row_max);
  check_row("row_sum", a.row_sum);
}

template <typename S>
void check_gate_output(const at::Tensor& out, const at::Tensor& gate) {
  check_strided("out", out);
  check_strided("gate", gate);
  const auto dtype = out.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "out must be float32, float64, bfloat16 or float16, but is ", dtype_name(dtype));
  check_dtype("gate", gate, "out's dtype", dtype);
  TORCH_CHECK(gate.device() == out.device(), "gate must be on out's device ", out.device(), ", but is on ", gate.device());
  const auto sizes = at::symint::sizes<S>(out);
  check_broadcastable<S>("gate", gate, "out's shape", Sizes<S>(sizes.begin(), sizes.end()));
}

template <typename S>
void check_gate_output_backward(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& gate) {
  check_gate_output<S>(out, gate);
  check_strided("grad", grad);
  check_dtype("grad", grad, "out's dtype", out.scalar_type());
  const auto sizes = at::symint::sizes<S>(out);
  check_shape<S>("grad", grad, "of out", Sizes<S>(sizes.begin(), sizes.end()));
}

}  // namespace torch_gated_attn
