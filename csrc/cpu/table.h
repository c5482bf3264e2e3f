// SPDX-License-Identifier: BSD-3-Clause
//
// The logit table of a super-block of queries: the bias as the starting values of the scores, [key][lane] per sub-block, in
// log2 units. It is built once for all rows that share the bias.

// The starting values of one tile: row i of key i is data + row[i] * block.
template <class A>
struct LogitTile {
  const A* data;
  const int32_t* row;
};

template <class A>
struct Table {
  const Problem& p;
  const int block;  // lanes of a sub-block
  A* data;          // [sub-block][k_len + 1][block], or two rows, of 0 and of -inf, where there is no bias
  int64_t stride;   // between sub-blocks

  Table(const Problem& p, int block, int max_lanes, Carver& c) : p(p), block(block) {
    stride = p.bias.data ? (p.k_len + 1) * block : 0;
    data = c.take<A>(p.bias.data ? max_lanes / block * stride : 2 * block);
  }

  // `bias` points at the first key of query 0 of the group's first head. Rows of keys outside `keys` stay as they are.
  template <class B>
  void build(const B* bias, const Lanes& lanes, const Range<int64_t>& keys) {
    if (!bias) {
      for (int l = 0; l < block; ++l) data[l] = 0, data[block + l] = -kInf<A>;
      return;
    }
    const auto to_log2 = [](Vec<A> x) { return log2_logit<A>(x); };
    for (int s = 0; s < lanes.padded; s += kLanes<A>) {
      A* table = data + s / block * stride + s % block;
      transpose_rows<B, A>(bias + keys.begin * p.bias.col, p.bias, lanes.lane + s, static_cast<int>(keys.size()), to_log2,
                           table + keys.begin * block, block);
      store(table + p.k_len * block, set1<A>(-kInf<A>));
    }
  }

  LogitTile<A> logits(int s, const int32_t* table_row) const { return {data + s * stride, table_row}; }
};

// `batch` is any row of the outer index, whose rows share the bias.
template <class T, class A>
static inline void build_table(Table<A>& table, const Problem& p, const Offsets& batch, int64_t head, const Lanes& lanes,
                               const Range<int64_t>& keys) {
  if constexpr (sizeof(T) == 2)
    if (p.bias_dtype == DType::kFloat32) return table.build(at<const float>(p.bias, batch.bias, head), lanes, keys);
  table.build(at<const T>(p.bias, batch.bias, head), lanes, keys);
}

// The logit that a bias adds, in log2 units.
template <class T, class A>
TGA_INLINE A bias_logit(const Problem& p, int64_t offset) {
  if (!p.bias.data) return 0;
  if (sizeof(T) == 2 && p.bias_dtype == DType::kFloat32)
    return log2_logit<A>(set1<A>(static_cast<const float*>(p.bias.data)[offset]))[0];
  return log2_logit<A>(set1<A>(load_one(static_cast<const T*>(p.bias.data) + offset)))[0];
}
