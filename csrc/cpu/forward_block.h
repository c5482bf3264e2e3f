// SPDX-License-Identifier: BSD-3-Clause
//
// Forward kernel. One unit of work is (outer batch index, key/value head, super-block of queries, range of rows): the logit
// table of its queries is built once and used by every row. S^T, P^T and O^T have a lane per query, so that the softmax
// needs no horizontal operation, keys and values are read as broadcasts from where they are, and no dimension is padded.
// Reads q, k, v once per super-block and the gate once; writes out, lse, row_max, row_sum once.

// Accumulators of one sub-block of queries.
template <class A, int NQ>
struct ForwardBlock {
  static constexpr int W = kLanes<A>, kBlock = NQ * W;
  // A shift stands this far (log2 units) above the logit that raised it, and is raised again only by one above the shift:
  // rescaling the accumulator becomes rare, and p <= 1, so sums of large values do not overflow. Each lane decides by
  // itself: a row's bits do not depend on its neighbours.
  static constexpr int kHeadroom = 10;

  const A* q;  // [head_dim][kBlock], times scale * log2(e)
  A* o;        // [value_dim][kBlock]
  A* sum;      // [kBlock]
  A* shift;    // [kBlock], log2 units
  int head_dim, value_dim;

  __attribute__((noinline, cold)) void rescale(const Vec<A>* highest) const {
    for (int u = 0; u < NQ; ++u) {
      const Vec<A> before = load(shift + u * W);
      const Vec<A> after = highest[u] > before ? highest[u] + set1<A>(kHeadroom) : before;
      const Vec<A> factor = exp2<A>(before - after);
      store(shift + u * W, after);
      store(sum + u * W, load(sum + u * W) * factor);
      for (int d = 0; d < value_dim; ++d) store(o + d * kBlock + u * W, load(o + d * kBlock + u * W) * factor);
    }
  }

  // Called before the keys whose highest logits these are enter the sums.
  inline __attribute__((always_inline)) void raise_shift(const Vec<A> (&highest)[NQ]) const {
    bool raise = false;
    TGA_UNROLL for (int u = 0; u < NQ; ++u) raise |= any_greater(highest[u], load(shift + u * W));
    if (__builtin_expect(raise, 0)) rescale(highest);
  }

  // Adds `count` keys, a multiple of kMicroKeys.
  void add_keys(const A* const* k, const A* const* v, const LogitTile<A>& logits, int count) const {
    for (int i = 0; i < count; i += kMicroKeys) {
      Vec<A> s[kMicroKeys][NQ], highest[NQ], m[NQ], l[NQ];
      TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] =
          load(logits.data + static_cast<int64_t>(logits.row[i + j]) * kBlock + u * W);
      add_dot<A, A, NQ>(s, k + i, q, head_dim);
      TGA_UNROLL for (int u = 0; u < NQ; ++u) {
        highest[u] = max(s[0][u], set1<A>(kLowest<A>));
        TGA_UNROLL for (int j = 1; j < kMicroKeys; ++j) highest[u] = max(s[j][u], highest[u]);
      }
      raise_shift(highest);
      TGA_UNROLL for (int u = 0; u < NQ; ++u) m[u] = load(shift + u * W), l[u] = load(sum + u * W);
      TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) {
        s[j][u] = exp2<A>(s[j][u] - m[u]);
        l[u] += s[j][u];
      }
      TGA_UNROLL for (int u = 0; u < NQ; ++u) store(sum + u * W, l[u]);
      add_outer<A, A, NQ>(o, s, v + i, value_dim);
    }
  }
};
