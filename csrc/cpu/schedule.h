// SPDX-License-Identifier: BSD-3-Clause
//
// How a call is cut into units of work. Whatever can change a bit of the result, the number of d_bias partials, depends on
// shapes alone; the rest may depend on the number of threads.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace torch_gated_attn {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough units per thread that the last ones to finish do not leave the others idle for long.
constexpr int64_t kUnitsPerThread = 4;

// Queries of a super-block: more use each loaded key tile more often, as long as the logit tables (`bytes_per_query` in
// all) stay in the second-level cache, of which half a MiB is taken.
inline int super_block(int64_t queries, int block, int64_t bytes_per_query) {
  constexpr int64_t kTableBytes = 640 << 10, kMaxQueries = 256;
  int64_t n = block;
  while (2 * n <= kMaxQueries && n < queries && 2 * n * bytes_per_query <= kTableBytes) n *= 2;
  return static_cast<int>(n);
}

// Key/value heads that are units of their own.
inline int64_t head_units(const Problem& p) { return has_few_queries(p) ? 1 : p.kv_heads; }

struct ForwardSchedule {
  int max_lanes;
  int64_t super_blocks, row_groups, rows_per_group;

  ForwardSchedule(const Problem& p, int block, int64_t element_size, int64_t threads) {
    const int64_t queries = p.heads / p.kv_heads * p.q_len;
    max_lanes = super_block(queries, block, p.bias.data ? p.k_len * element_size : 0);
    super_blocks = ceil_div(queries, max_lanes);
    const int64_t units = p.outer * head_units(p) * super_blocks;
    rows_per_group = ceil_div(p.rows, std::min(p.rows, ceil_div(kUnitsPerThread * threads, units)));
    row_groups = ceil_div(p.rows, rows_per_group);
  }
  int64_t units(const Problem& p) const { return p.outer * head_units(p) * super_blocks * row_groups; }
  ForwardUnitOfWork unit(const Problem& p, int64_t i) const {
    const int64_t group = i % row_groups, block = i / row_groups % super_blocks, head = i / row_groups / super_blocks;
    const int64_t queries = p.heads / p.kv_heads * p.q_len;
    return {head / head_units(p),   head % head_units(p),
            block * max_lanes,      std::min(queries, (block + 1) * max_lanes),
            group * rows_per_group, std::min(p.rows, (group + 1) * rows_per_group)};
  }
};

struct BackwardSchedule {
  int max_lanes;
  int64_t row_groups, rows_per_group;

  BackwardSchedule(const Problem& p, bool with_bias_gradient, int block, int64_t element_size, int64_t threads) {
    max_lanes = super_block(p.heads / p.kv_heads * p.q_len, block, p.bias.data ? 2 * p.k_len * element_size : 0);
    // 32 units keep as many threads busy. Each group of rows costs one more logit table and partial sum of d_bias, which 16
    // rows make cheap.
    constexpr int64_t kUnitsWithPartials = 32, kRowsPerPartial = 16;
    const int64_t heads = p.outer * head_units(p);
    const int64_t groups = with_bias_gradient
                               ? std::min(ceil_div(kUnitsWithPartials, heads), ceil_div(p.rows, kRowsPerPartial))
                               : ceil_div(kUnitsPerThread * threads, heads);
    rows_per_group = ceil_div(p.rows, std::min(p.rows, groups));
    row_groups = ceil_div(p.rows, rows_per_group);
  }
  int64_t units(const Problem& p) const { return p.outer * head_units(p) * row_groups; }
  BackwardUnitOfWork unit(const Problem& p, int64_t i) const {
    const int64_t group = i % row_groups, head = i / row_groups;
    return {head / head_units(p), head % head_units(p), group * rows_per_group,
            std::min(p.rows, (group + 1) * rows_per_group), 0};
  }
};

}  // namespace torch_gated_attn
