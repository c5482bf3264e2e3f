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

// Where a call has fewer independent units than this, its keys (forward) or queries (backward) are shared out, so that
// every thread works. The number of parts is a matter of shapes alone: it decides in which order sums are taken. 16
// backward units split in two (16 heads of 384) made two threads 12 % slower.
constexpr int64_t kEnoughUnits = 16;

struct ForwardSchedule {
  // Fewer keys than this to a part would cost more in states to merge than they save.
  static constexpr int64_t kKeysPerPart = 512;

  int max_lanes;
  int64_t super_blocks, row_groups, rows_per_group, parts, keys_per_part;

  ForwardSchedule(const Problem& p, int block, int64_t element_size, int64_t threads) {
    const int64_t queries = p.heads / p.kv_heads * p.q_len;
    max_lanes = super_block(queries, block, p.bias.data ? p.k_len * element_size : 0);
    super_blocks = ceil_div(queries, max_lanes);
    const int64_t heads = p.outer * head_units(p) * super_blocks;
    parts = std::max<int64_t>(1, std::min(p.k_len / kKeysPerPart, ceil_div(kEnoughUnits, heads * p.rows)));
    keys_per_part = ceil_div(p.k_len, parts);
    parts = ceil_div(p.k_len, keys_per_part);
    rows_per_group = ceil_div(p.rows, std::min(p.rows, ceil_div(kUnitsPerThread * threads, heads)));
    row_groups = ceil_div(p.rows, rows_per_group);
  }
  // The units of one part, or of the merge.
  int64_t units(const Problem& p) const { return p.outer * head_units(p) * super_blocks * row_groups; }
  // Unit i of units() * parts. `states`: units() * parts * rows_per_group of them, `state` bytes each.
  ForwardUnitOfWork unit(const Problem& p, int64_t i, char* states, int64_t state) const {
    const int64_t part = i / units(p), of_part = i % units(p);
    // Later queries see more keys of a causal call: the longest units first.
    const int64_t group = of_part % row_groups, block = super_blocks - 1 - of_part / row_groups % super_blocks;
    const int64_t head = of_part / row_groups / super_blocks, queries = p.heads / p.kv_heads * p.q_len;
    ForwardUnitOfWork w{};
    w.outer = head / head_units(p), w.kv_head = head % head_units(p);
    w.first_query = block * max_lanes, w.end_query = std::min(queries, (block + 1) * max_lanes);
    w.row_begin = group * rows_per_group, w.row_end = std::min(p.rows, (group + 1) * rows_per_group);
    w.keys = {part * keys_per_part, std::min(p.k_len, (part + 1) * keys_per_part)};
    w.state = parts > 1 ? states + i * rows_per_group * state : nullptr;
    return w;
  }
  int64_t state_stride(const Problem& p, int64_t state) const { return units(p) * rows_per_group * state; }
};

struct BackwardSchedule {
  int max_lanes;
  int64_t row_groups, rows_per_group, parts, queries_per_part;
  // Slices of d_bias, which the launcher sums: one to a group of rows, to a key/value head where the heads share a bias,
  // and to a part where queries of several may share an element.
  int64_t slices_of_heads, slices_of_parts;

  BackwardSchedule(const Problem& p, int block, int64_t element_size, int64_t threads) {
    const int64_t queries = p.heads / p.kv_heads * p.q_len, heads = p.outer * head_units(p);
    max_lanes = super_block(queries, block, p.bias.data ? 2 * p.k_len * element_size : 0);
    // Each group of rows costs one more logit table and partial sum of d_bias, which 16 rows make cheap.
    constexpr int64_t kRowsPerPartial = 16;
    const int64_t most_groups = p.d_bias.data ? ceil_div(p.rows, kRowsPerPartial) : p.rows;
    // 32 units keep as many threads busy.
    constexpr int64_t kUnitsWithPartials = 32;
    const int64_t groups = ceil_div(p.d_bias.data ? kUnitsWithPartials : kUnitsPerThread * threads, heads);
    rows_per_group = ceil_div(p.rows, std::min(most_groups, groups));
    row_groups = ceil_div(p.rows, rows_per_group);
    const int64_t super_blocks = has_few_queries(p) ? 1 : ceil_div(queries, max_lanes);
    // Each part holds a float copy of d_key and d_value: with 16 of them a step of Qwen3-Next took 25 MiB more than
    // PyTorch's.
    constexpr int64_t kMostParts = 4;
    parts = std::min({super_blocks, ceil_div(kEnoughUnits, heads * most_groups), kMostParts});
    queries_per_part = ceil_div(super_blocks, parts) * max_lanes;
    parts = ceil_div(queries, queries_per_part);
    slices_of_heads = p.d_bias.head == 0 ? head_units(p) : 1;
    slices_of_parts = d_bias_is_stored(p) ? 1 : parts;
  }
  int64_t slices() const { return row_groups * slices_of_heads * slices_of_parts; }
  int64_t units(const Problem& p) const { return p.outer * head_units(p) * row_groups; }
  // Rows of d_key and of d_value that the units of one part have.
  int64_t part_rows(const Problem& p) const { return units(p) * rows_per_group; }
  // Unit i of units() * parts. `d_key`, `d_value`: part_rows() * parts rows of `k_row` and `v_row` bytes. A slice of d_bias
  // has `slice` elements.
  BackwardUnitOfWork unit(const Problem& p, int64_t i, int64_t slice, char* d_key, int64_t k_row, char* d_value,
                          int64_t v_row) const {
    const int64_t part = parts - 1 - i / units(p), of_part = i % units(p);  // the longest units of a causal call first
    const int64_t group = of_part % row_groups, head = of_part / row_groups;
    const int64_t queries = p.heads / p.kv_heads * p.q_len, place = part * part_rows(p) + of_part * rows_per_group;
    BackwardUnitOfWork w{};
    w.outer = head / head_units(p), w.kv_head = head % head_units(p);
    w.first_query = part * queries_per_part, w.end_query = std::min(queries, (part + 1) * queries_per_part);
    w.row_begin = group * rows_per_group, w.row_end = std::min(p.rows, (group + 1) * rows_per_group);
    w.partial =
        ((group * slices_of_heads + w.kv_head % slices_of_heads) * slices_of_parts + part % slices_of_parts) * slice;
    if (parts > 1) w.d_key = d_key + place * k_row, w.d_value = d_value + place * v_row;
    return w;
  }
};

}  // namespace torch_gated_attn
