// SPDX-License-Identifier: BSD-3-Clause
//
// A SIMD lane is a query. The queries of all heads that share a key/value head form one list of "virtual" queries, number
// head_in_group * q_len + query, which is cut into sub-blocks of NQ vectors: grouped-query attention is then the plain
// case with more lanes. Transposed tiles, [head_dim or key][lane], are what the products read.

constexpr int kMaxLanes = 256;  // of a super-block: enough to use every loaded key and value tile eight times
constexpr int kTileKeys = 32;   // keys of a tile, whose rows stay in the first-level cache over all sub-blocks

struct Lane {
  int32_t head, row;  // head within the key/value group, query position
  int64_t offset(const View& v) const { return head * v.head + row * v.row; }
};

// The lanes of one super-block. Tail lanes repeat the last query: they are computed and never stored.
struct Lanes {
  int count = 0;        // that exist
  int padded = 0;       // a multiple of the sub-block
  Range<int64_t> rows;  // the query positions among them, or all where they span heads
  Lane lane[kMaxLanes];

  void fill(int64_t first, int64_t end, int64_t q_len, int block) {
    count = static_cast<int>(end - first);
    padded = (count + block - 1) / block * block;
    const bool one_head = first / q_len == (end - 1) / q_len;
    rows = one_head ? Range<int64_t>{first % q_len, (end - 1) % q_len + 1} : Range<int64_t>{0, q_len};
    for (int i = 0; i < padded; ++i) {
      const int64_t virtual_query = first + (i < count ? i : count - 1);
      lane[i] = {static_cast<int32_t>(virtual_query / q_len), static_cast<int32_t>(virtual_query % q_len)};
    }
  }
};

template <class A>
TGA_INLINE auto times(double factor) {
  return [f = static_cast<A>(factor)](Vec<A> x) { return x * set1<A>(f); };
}

// dst[j * stride + i] = map(src[lane i][j]) for kLanes lanes and j < count. `col` is 0 or 1 (0: all j alike). Asks for the
// rows of the lanes after these, which the hardware does not see coming while it follows kLanes rows.
template <class T, class A, class Map>
static inline void transpose_rows(const T* base, const View& v, const Lane* lane, int count, const Map& map, A* dst,
                                  int stride) {
  constexpr int W = kLanes<A>;
  const T* rows[W];
  for (int i = 0; i < W; ++i) rows[i] = base + lane[i].offset(v);
  for (int j = 0; j < count; j += W) {
    const int n = count - j < W ? count - j : W;
    if (v.col != 0 && 2 * n <= W) {
      Vec<A> r[W / 2];
      TGA_UNROLL for (int i = 0; i < W / 2; ++i) r[i] =
          map(lower_halves(load_n(rows[i] + j, n), load_n(rows[i + W / 2] + j, n)));
      transpose_halves<A>(r);
      for (int i = 0; i < n; ++i) store(dst + (j + i) * stride, r[i]);
      return;
    }
    Vec<A> r[W];
    if (v.col != 0) {
      TGA_UNROLL for (int i = 0; i < W; ++i) {
        __builtin_prefetch(rows[i] + W * v.row + j);
        r[i] = map(load_n(rows[i] + j, n));
      }
    } else {
      TGA_UNROLL for (int i = 0; i < W; ++i) r[i] = map(set1<A>(static_cast<A>(load_one(rows[i]))));
    }
    transpose<A>(r);
    if (n == W) {
      TGA_UNROLL for (int i = 0; i < W; ++i) store(dst + (j + i) * stride, r[i]);
    } else {
      for (int i = 0; i < n; ++i) store(dst + (j + i) * stride, r[i]);
    }
  }
}

// The inverse, for results: dst[lane i][j] = factor_i * src[j * stride + i], j < count, for the first `lanes` lanes.
template <class T, class A>
static inline void store_transposed(const A* src, int stride, int count, Vec<A> factor, T* base, const View& v,
                                    const Lane* lane, int lanes) {
  constexpr int W = kLanes<A>;
  for (int j = 0; j < count; j += W) {
    const int n = count - j < W ? count - j : W;
    if (2 * n <= W) {
      Vec<A> r[W / 2];
      TGA_UNROLL for (int i = 0; i < W / 2; ++i) r[i] = i < n ? load(src + (j + i) * stride) * factor : Vec<A>{};
      transpose_halves<A>(r);
      for (int i = 0; i < W / 2 && i < lanes; ++i) {
        store_n(base + lane[i].offset(v) + j, r[i], n);
        if (i + W / 2 < lanes) store_n(base + lane[i + W / 2].offset(v) + j, upper_half(r[i]), n);
      }
      return;
    }
    Vec<A> r[W];
    TGA_UNROLL for (int i = 0; i < W; ++i) r[i] = i < n ? load(src + (j + i) * stride) * factor : Vec<A>{};
    transpose<A>(r);
    for (int i = 0; i < W && i < lanes; ++i) store_n(base + lane[i].offset(v) + j, r[i], n);
  }
}

// Offsets of one batch entry, per operand.
struct Offsets {
  int64_t query, key, value, gate, mask, bias, out, lse, row_max, row_sum, grad_out, grad_lse, d_query, d_key, d_value,
      d_gate, d_bias, key_lengths;
  Offsets(const Problem& p, int64_t index) {
    int64_t coordinate[kMaxBatchDims];
    for (int d = kMaxBatchDims - 1; d >= 0; --d) {
      coordinate[d] = index % p.batch[d];
      index /= p.batch[d];
    }
    const auto offset = [&](const View& v) {
      int64_t sum = 0;
      for (int d = 0; d < kMaxBatchDims; ++d) sum += coordinate[d] * v.batch[d];
      return sum;
    };
    query = offset(p.query), key = offset(p.key), value = offset(p.value), gate = offset(p.gate), mask = offset(p.mask);
    bias = offset(p.bias), out = offset(p.out), lse = offset(p.lse), row_max = offset(p.row_max),
    row_sum = offset(p.row_sum);
    grad_out = offset(p.grad_out), grad_lse = offset(p.grad_lse), d_query = offset(p.d_query), d_key = offset(p.d_key);
    d_value = offset(p.d_value), d_gate = offset(p.d_gate), d_bias = offset(p.d_bias);
    key_lengths = offset(p.key_lengths);
  }
};

// The element of `v` at the given batch offset and head; null where the operand is absent.
template <class T>
TGA_INLINE T* at(const View& v, int64_t batch_offset, int64_t head) {
  return v.data ? static_cast<T*>(v.data) + batch_offset + head * v.head : nullptr;
}
// `n` gate logits of one lane from dimension d; a headwise gate has one for all.
template <class T, class A>
TGA_INLINE Vec<A> load_gate(const T* gate, const View& v, int d, int n) {
  return v.col != 0 ? load_n(gate + d, n) : set1<A>(static_cast<A>(load_one(gate)));
}
