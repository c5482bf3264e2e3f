// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "kernels.h"
#include "plain_backward.cuh"

namespace torch_gated_attn::cuda {

inline int64_t plain_blocks(const AttentionParams& p, int64_t heads, int64_t rows) {
  return (rows + kPlainThreads - 1) / kPlainThreads * heads * p.batch.rows * p.batch.slabs;
}

// Calls f with the compiled width that holds `head_dim`: few widths, since the padding only costs time.
template <class F>
void with_plain_width(int head_dim, F f) {
  if (head_dim <= 32) {
    f(std::integral_constant<int, 32>());
  } else if (head_dim <= 64) {
    f(std::integral_constant<int, 64>());
  } else {
    f(std::integral_constant<int, 128>());
  }
}

template <class T>
constexpr size_t plain_shared_bytes(int width) {
  return 2 * kPlainTile * width * sizeof(T);
}

template <class T>
void launch_plain_forward(const PlainParams<T>& p, int head_dim, void* stream) {
  with_plain_width(head_dim, [&](auto width) {
    dev::launch(plain_forward_kernel<T, width.value>, p, plain_blocks(p, p.heads, p.q_len), kPlainThreads,
                plain_shared_bytes<T>(width.value), stream, "the plain forward kernel");
  });
}

template <class T>
void launch_plain_backward(const PlainParams<T>& p, int head_dim, void* stream) {
  dev::launch(plain_rows_kernel<T>, p, plain_blocks(p, p.heads, p.q_len), kPlainThreads, 0, stream,
              "the plain backward kernel for the rows");
  with_plain_width(head_dim, [&](auto width) {
    const size_t shared = plain_shared_bytes<T>(width.value);
    if (p.d_query.data != nullptr) {
      dev::launch(plain_query_kernel<T, width.value>, p, plain_blocks(p, p.heads, p.q_len), kPlainThreads, shared, stream,
                  "the plain backward kernel for query");
    }
    if (p.d_key.data != nullptr || p.d_value.data != nullptr) {
      dev::launch(plain_key_kernel<T, width.value>, p, plain_blocks(p, p.kv_heads, p.k_len), kPlainThreads, shared, stream,
                  "the plain backward kernel for key and value");
    }
  });
  if (p.d_bias.data != nullptr) {
    const int64_t heads = p.d_bias.head == 0 ? 1 : p.heads, queries = p.d_bias.row == 0 ? 1 : p.q_len,
                  keys = p.d_bias.col == 0 ? 1 : p.k_len;
    const int64_t elements = p.batch.slabs / p.batch.slabs_per_outer * heads * queries * keys;
    dev::launch(plain_bias_kernel<T>, p, (elements + kPlainThreads - 1) / kPlainThreads, kPlainThreads, 0, stream,
                "the plain backward kernel for the bias");
  }
}

}  // namespace torch_gated_attn::cuda
