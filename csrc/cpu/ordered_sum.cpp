// SPDX-License-Identifier: BSD-3-Clause
#include "ordered_sum.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "threads.h"

namespace torch_gated_attn {
namespace {

// In double: equal parts, as an expanded gradient gives, would round all the same way in float.
template <class Part, class Out>
void sum_parts(const Part* parts, int64_t count, int64_t n, Out* out) {
  constexpr int64_t kChunk = 4096;  // sums on the stack, 32 KiB at most
  parallel_for((n + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
    double sum[kChunk];
    for (int64_t first = begin * kChunk; first < std::min(n, end * kChunk); first += kChunk) {
      const int64_t length = std::min(kChunk, n - first);
      std::fill_n(sum, length, 0.0);
      for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < length; ++i) sum[i] += static_cast<double>(parts[p * n + first + i]);
      for (int64_t i = 0; i < length; ++i) out[first + i] = static_cast<Out>(sum[i]);
    }
  });
}

}  // namespace

void ordered_sum(const at::Tensor& parts, const at::Tensor& out) {
  const int64_t n = out.numel();
  if (n == 0) return;
  const at::Tensor dense_parts = parts.contiguous();
  const at::Tensor dense_out = out.is_contiguous() ? out : at::empty(out.sizes(), out.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, out.scalar_type(), "ordered_sum", [&] {
    using Out = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, parts.scalar_type(), "ordered_sum", [&] {
      sum_parts<scalar_t, Out>(dense_parts.const_data_ptr<scalar_t>(), parts.numel() / n, n,
                               dense_out.mutable_data_ptr<Out>());
    });
  });
  if (!dense_out.is_same(out)) out.copy_(dense_out);
}

at::Tensor broadcast_dims_first(const at::Tensor& full, at::IntArrayRef sizes) {
  std::vector<int64_t> order, kept;
  const int64_t missing = full.dim() - static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; d < full.dim(); ++d) {
    const bool broadcast = d < missing || (sizes[d - missing] == 1 && full.size(d) != 1);
    (broadcast ? order : kept).push_back(d);
  }
  const int64_t reduced = static_cast<int64_t>(order.size());
  order.insert(order.end(), kept.begin(), kept.end());
  const at::Tensor moved = full.permute(order).contiguous();
  return reduced == 0 ? moved.unsqueeze(0) : moved.flatten(0, reduced - 1);
}

}  // namespace torch_gated_attn
