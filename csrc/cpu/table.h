// SPDX-License-Identifier: BSD-3-Clause
//
// The logit table of a super-block of queries: bias and mask as the starting values of the scores, [key][lane] per
// sub-block, in log2 units. It is built once for all rows that share the bias.

// The starting values of one tile: row i of key i is data + row[i] * block.
template <class A>
struct LogitTile {
  const A* data;
  const int32_t* row;
};

template <class A>
struct Table {
  const Problem& p;
  const int block;      // lanes of a sub-block
  const bool key_mask;  // Keys applies the mask
  const bool shared;    // the table has a row per key
  const bool per_row;   // the mask depends on the query and on the row: applied tile by tile (mask_tile)
  A* data;              // [sub-block][k_len + 1][block], or two rows, of 0 and of -inf
  int64_t stride;       // between sub-blocks
  A* tile;              // [kTileKeys][block]
  int32_t tile_row[kTileKeys];

  Table(const Problem& p, int block, int max_lanes, Carver& c)
      : p(p),
        block(block),
        key_mask(masks_keys(p)),
        shared(shares_logits(p)),
        per_row(p.mask.data && !key_mask && p.mask_varies_by_row) {
    stride = shared ? (p.k_len + 1) * block : 0;
    data = c.take<A>(shared ? max_lanes / block * stride : 2 * block);
    tile = c.take<A>(per_row ? kTileKeys * block : 0);
  }

  // `bias` and `mask` point at the first key of query 0 of the group's first head.
  template <class B>
  void build(const B* bias, const uint8_t* mask, const Lanes& lanes) {
    if (!shared) {
      for (int l = 0; l < block; ++l) data[l] = 0, data[block + l] = -kInf<A>;
      return;
    }
    for (int s = 0; s < lanes.padded; s += block)
      build_block(bias, per_row || key_mask ? nullptr : mask, lanes.lane + s, data + s / block * stride);
  }

  // The tile of sub-block s for `count` listed keys, of which `attended` are not padding. `mask` is of this row.
  LogitTile<A> logits(int s, const int32_t* table_row, const int32_t* key, const uint8_t* mask, const Lanes& lanes,
                      int count, int attended) {
    const A* table = data + s * stride;
    if (!per_row) return {table, table_row};
    for (int i = 0; i < count; ++i) {
      tile_row[i] = i;
      for (int u = 0; u < block; u += kLanes<A>) store(tile + i * block + u, load(table + table_row[i] * block + u));
    }
    for (int l = 0; l < block; ++l) {
      const uint8_t* row = mask + lanes.lane[s * block + l].offset(p.mask);
      for (int i = 0; i < count && i < attended; ++i)
        if (!row[key[i] * p.mask.col]) tile[i * block + l] = -kInf<A>;
    }
    return {tile, tile_row};
  }

 private:
  template <class B>
  void build_block(const B* bias, const uint8_t* mask, const Lane* lane, A* table) const {
    constexpr int W = kLanes<A>;
    for (int u = 0; u < block; u += W) {
      if (bias)
        transpose_rows<B, A>(
            bias, p.bias, lane + u, static_cast<int>(p.k_len), [](Vec<A> x) { return log2_logit<A>(x); }, table + u, block);
      else
        for (int64_t k = 0; k < p.k_len; ++k) store(table + k * block + u, Vec<A>{});
      store(table + p.k_len * block + u, set1<A>(-kInf<A>));
    }
    if (!mask) return;
    for (int l = 0; l < block; ++l) {
      const uint8_t* row = mask + lane[l].offset(p.mask);
      for (int64_t k = 0; k < p.k_len; ++k)
        if (!row[k * p.mask.col]) table[k * block + l] = -kInf<A>;
    }
  }
};

// `batch` is any row of the outer index: bias, and a mask that enters the table, are the same for all of them.
template <class T, class A>
static inline void build_table(Table<A>& table, const Problem& p, const Offsets& batch, int64_t head, const Lanes& lanes) {
  const uint8_t* mask = at<const uint8_t>(p.mask, batch.mask, head);
  if constexpr (sizeof(T) == 2)
    if (p.bias_dtype == DType::kFloat32) return table.build(at<const float>(p.bias, batch.bias, head), mask, lanes);
  table.build(at<const T>(p.bias, batch.bias, head), mask, lanes);
}
