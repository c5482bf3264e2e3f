// SPDX-License-Identifier: BSD-3-Clause
//
// Backward kernel. One unit of work is (outer batch index, key/value head, range of rows) and owns the d_query, d_key,
// d_value and d_gate of its rows and one slice of d_bias. With g = sigmoid(gate), y = out, r = 1 / row_sum and
// e_ij = 2^(s_ij - row_max), so that p = e * r:
//
//     d_gate = dY * y * (1 - g)      dO = r * dY * g      delta_i = r * (sum_d dY_id y_id - dlse_i)
//     dS_ij  = e_ij * (<dO_i, v_j> - delta_i)             dV_j = sum_i e_ij dO_i
//     dQ_i   = scale * sum_j dS_ij k_j                    dK_j = scale * sum_i dS_ij q_i          d_bias = dS
//
// r is multiplied into the rows of dO and delta, never into a score. dBias^T of a super-block of queries stays in the
// second-level cache over all rows of the unit and is transposed and stored once.

// One sub-block of queries.
template <class A, int NQ>
struct BackwardBlock {
  static constexpr int W = kLanes<A>, kBlock = NQ * W;

  const A *q, *d_o;            // [dimension][kBlock]; q times scale * log2(e)
  const A *q_rows, *d_o_rows;  // [lane][stride]; see add_rows for the layout
  const A *shift, *minus_delta;
  A* d_q;      // [head_dim][kBlock], null if not wanted
  A* d_table;  // [k_len + 1][kBlock], null if not wanted
  A *p, *d_s;  // [kTileKeys][kBlock]
  int head_dim, value_dim, lanes;
  int64_t k_stride, v_stride;

  // d_k, d_v: accumulator rows of the listed keys, null if not wanted.
  void add_keys(const A* const* k, const A* const* v, const LogitTile<A>& logits, const int32_t* d_table_row, int count,
                A* d_k, A* d_v, Prefetch& prefetch) const {
    for (int i = 0; i < count; i += kMicroKeys) {
      scores(k + i, logits, i, prefetch);
      prefetch.micro_tile(2), prefetch.micro_tile(6);
      Vec<A> s[kMicroKeys][NQ];
      TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] =
          load(minus_delta + u * W);
      add_dot<A, A, NQ>(s, v + i, d_o, value_dim);
      prefetch.micro_tile(3), prefetch.micro_tile(7);
      TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) {
        s[j][u] *= load(p + (i + j) * kBlock + u * W);
        store(d_s + (i + j) * kBlock + u * W, s[j][u]);
      }
      if (d_table) {
        TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) {
          A* t = d_table + static_cast<int64_t>(d_table_row[i + j]) * kBlock + u * W;
          store(t, load(t) + s[j][u]);
        }
      }
      prefetch.micro_tile(4), prefetch.micro_tile(8);
      if (d_q) add_outer<A, A, NQ>(d_q, s, k + i, head_dim);
      prefetch.micro_tile(5), prefetch.micro_tile(9);
    }
    if (d_v) rows(value_dim, d_v, p, d_o_rows, count, v_stride);
    if (d_k) rows(head_dim, d_k, d_s, q_rows, count, k_stride);
  }

 private:
  // p = 2^(s - shift)
  inline __attribute__((always_inline)) void scores(const A* const* k, const LogitTile<A>& logits, int i,
                                                    Prefetch& prefetch) const {
    Vec<A> s[kMicroKeys][NQ], m[NQ];
    TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] =
        load(logits.data + static_cast<int64_t>(logits.row[i + j]) * kBlock + u * W);
    prefetch.micro_tile(0);
    add_dot<A, A, NQ>(s, k, q, head_dim);
    prefetch.micro_tile(1);
    TGA_UNROLL for (int u = 0; u < NQ; ++u) m[u] = load(shift + u * W);
    TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u)
        store(p + (i + j) * kBlock + u * W, exp2<A, true>(s[j][u] - m[u]));
  }
  void rows(int dim, A* acc, const A* tile, const A* right, int count, int64_t stride) const {
    if constexpr (kInterleaves<A>)
      if (interleaved<A>(dim)) return add_rows<A, A, 2>(acc, tile, kBlock, right, count, (lanes + 1) / 2 * 2, stride);
    add_rows<A, A, 1>(acc, tile, kBlock, right, count, lanes, stride);
  }
};
