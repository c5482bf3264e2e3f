// SPDX-License-Identifier: BSD-3-Clause
#include "describe.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <vector>

namespace torch_gated_attn {
namespace {

// One operand before its batch dimensions are merged.
struct Walk {
  View* view;
  std::vector<int64_t> batch;  // strides, right-aligned with the call's batch dimensions
};

// Stride of dimension `from_right` (1 = last), 0 where the operand is broadcast or has no such dimension.
int64_t broadcast_stride(const at::Tensor& t, int64_t from_right) {
  const int64_t d = t.dim() - from_right;
  return d < 0 || t.size(d) == 1 ? 0 : t.stride(d);
}

// A meta tensor, whose layout explain() asks about, begins at a multiple of 256 bytes, as PyTorch allocates, but for its
// offset; not at 0, which is an absent operand.
void* address(const at::Tensor& t) {
  if (!t.is_meta()) return t.data_ptr();
  return reinterpret_cast<void*>(256 + t.storage_offset() * t.element_size());
}

// `row_dims`: 2 for [*, H, L, C] operands, 1 for [*, H, L] ones, -1 for [*] ones.
Walk walk(const at::Tensor& t, View& view, int64_t row_dims, int64_t batch_dims) {
  view.data = address(t);
  view.col = row_dims == 2 ? broadcast_stride(t, 1) : 0;
  view.row = row_dims > 0 ? broadcast_stride(t, row_dims) : 0;
  view.head = row_dims > 0 ? broadcast_stride(t, row_dims + 1) : 0;
  Walk w{&view, {}};
  for (int64_t d = 0; d < batch_dims; ++d) w.batch.push_back(broadcast_stride(t, row_dims + 1 + batch_dims - d));
  return w;
}

// Whether dimension `inner` continues dimension `outer` for every operand.
bool mergeable(const std::vector<Walk>& walks, const std::vector<int64_t>& sizes, size_t outer, size_t inner) {
  for (const Walk& w : walks)
    if (w.batch[outer] != w.batch[inner] * sizes[inner]) return false;
  return true;
}

bool merge_batch(std::vector<Walk>& walks, const at::Tensor& query, Problem& p) {
  const int64_t batch_dims = query.dim() - 3;
  const auto by_bias = [&](size_t d) {  // whether the bias or its gradient has this dimension
    for (const Walk& w : walks)
      if ((w.view == &p.bias || w.view == &p.d_bias) && w.batch[d] != 0) return true;
    return false;
  };
  std::vector<int64_t> sizes;
  std::vector<size_t> kept;  // into query's dimensions
  size_t outer_dims = 0;
  for (const bool outer : {true, false}) {
    for (int64_t d = 0; d < batch_dims; ++d) {
      if (query.size(d) == 1 || by_bias(d) != outer) continue;
      kept.push_back(d);
      sizes.push_back(query.size(d));
    }
    if (outer) outer_dims = kept.size();
  }
  for (Walk& w : walks) {
    std::vector<int64_t> strides;
    for (const size_t d : kept) strides.push_back(w.batch[d]);
    w.batch = strides;
  }
  for (size_t d = sizes.size(); d-- > 1;) {
    if (d == outer_dims || !mergeable(walks, sizes, d - 1, d)) continue;
    sizes[d - 1] *= sizes[d];
    sizes.erase(sizes.begin() + d);
    for (Walk& w : walks) w.batch.erase(w.batch.begin() + (d - 1));
    if (d < outer_dims) --outer_dims;
  }
  if (sizes.size() > kMaxBatchDims) return false;
  const size_t first = kMaxBatchDims - sizes.size();
  for (size_t d = 0; d < sizes.size(); ++d) {
    p.batch[first + d] = sizes[d];
    (d < outer_dims ? p.outer : p.rows) *= sizes[d];
    for (Walk& w : walks) w.view->batch[first + d] = w.batch[d];
  }
  return true;
}

}  // namespace

DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return DType::kFloat32;
  }
}

std::optional<Problem> describe(const Operands& o, const Arguments& a) {
  Problem p;
  p.dtype = kernel_dtype(o.query.scalar_type());
  p.bias_dtype = o.bias.defined() ? kernel_dtype(o.bias.scalar_type()) : p.dtype;
  p.heads = o.query.size(-3);
  p.kv_heads = o.key.size(-3);
  p.q_len = o.query.size(-2);
  p.k_len = o.key.size(-2);
  p.head_dim = o.query.size(-1);
  p.value_dim = o.value.size(-1);
  p.scale = a.scale ? *a.scale : 1 / std::sqrt(static_cast<double>(p.head_dim));
  if (p.head_dim == 0) p.scale = 0;  // no product to scale
  p.mean_rows = a.masked_rows == "mean";
  p.is_causal = a.is_causal;
  p.window = a.window.value_or(0);

  std::vector<Walk> walks;
  const auto add = [&](const at::Tensor& t, View& view, int64_t row_dims) {
    if (t.defined()) walks.push_back(walk(t, view, row_dims, o.query.dim() - 3));
  };
  add(o.query, p.query, 2), add(o.key, p.key, 2), add(o.value, p.value, 2), add(o.gate, p.gate, 2);
  add(o.bias, p.bias, 2), add(o.mask, p.mask, 2), add(o.out, p.out, 2), add(o.grad_out, p.grad_out, 2);
  add(o.lse, p.lse, 1), add(o.row_max, p.row_max, 1), add(o.row_sum, p.row_sum, 1), add(o.grad_lse, p.grad_lse, 1);
  add(o.d_query, p.d_query, 2), add(o.d_key, p.d_key, 2), add(o.d_value, p.d_value, 2), add(o.d_gate, p.d_gate, 2);
  add(o.d_bias, p.d_bias, 2), add(o.key_lengths, p.key_lengths, -1);
  if (!merge_batch(walks, o.query, p)) return std::nullopt;
  return p;
}

namespace {
at::Tensor with_rows(const at::Tensor& tensor, bool may_broadcast) {
  if (!tensor.defined() || tensor.dim() == 0) return tensor;
  const int64_t last = tensor.dim() - 1, stride = tensor.stride(last);
  if (tensor.size(last) <= 1 || stride == 1 || (stride == 0 && may_broadcast)) return tensor;
  at::Tensor distinct = tensor;
  for (int64_t d = 0; d < last; ++d)
    if (tensor.stride(d) == 0 && tensor.size(d) > 1) distinct = distinct.narrow(d, 0, 1);
  return distinct.contiguous().expand(tensor.sizes());
}
}  // namespace

at::Tensor with_dense_rows(const at::Tensor& tensor) { return with_rows(tensor, /*may_broadcast=*/true); }
at::Tensor with_contiguous_rows(const at::Tensor& tensor) { return with_rows(tensor, /*may_broadcast=*/false); }

}  // namespace torch_gated_attn
