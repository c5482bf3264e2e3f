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
  // A shift stands this far (log2 units) above the logit that raised it, and is raised again only when the probabilities of
  // a micro-tile add up to more than 1: rescaling the accumulator becomes rare, and no p exceeds 1, so sums of large values
  // do not overflow. Each lane decides by itself: a row's bits do not depend on its neighbours. 7, since the exponents of
  // the largest keys are then in [4, 8), where a rounding is half of what it is from 8 on; with 4, rescaling costs a
  // seventh.
  static constexpr int kHeadroom = 7;

  const A* q;  // [head_dim][kBlock], times scale * log2(e)
  A* o;        // [value_dim][kBlock]
  A* sum;      // [kBlock]
  A* shift;    // [kBlock], log2 units
  int head_dim, value_dim;

  // Before the first keys: no exponential is computed in vain.
  void start(const A* scores, int keys) const {
    for (int u = 0; u < NQ; ++u) store(shift + u * W, highest(scores + u * W, keys) + set1<A>(kHeadroom));
  }

  // `scores` [keys][kBlock] gave these totals.
  __attribute__((noinline, cold)) void raise_shift(const A* scores, int keys, const Vec<A>* total) const {
    for (int u = 0; u < NQ; ++u) {
      const Vec<A> before = load(shift + u * W);
      const Vec<A> after = total[u] > set1<A>(1) ? highest(scores + u * W, keys) + set1<A>(kHeadroom) : before;
      store(shift + u * W, after);
      const Vec<A> factor = exp2<A>(before - after);
      store(sum + u * W, load(sum + u * W) * factor);
      for (int d = 0; d < value_dim; ++d) store(o + d * kBlock + u * W, load(o + d * kBlock + u * W) * factor);
    }
  }

  static Vec<A> highest(const A* scores, int keys) {
    Vec<A> x = set1<A>(kLowest<A>);
    for (int j = 0; j < keys; ++j) x = max(load(scores + j * kBlock), x);
    return x;
  }

  // Adds the probabilities of KEYS keys to the sums, and passes each on as take(key, vector of lanes, probability).
  template <int KEYS, class F>
  inline __attribute__((always_inline)) void softmax(const A* scores, const F& take) const {
    Vec<A> total[NQ];
    for (bool raised = false;; raised = true) {
      bool exceeds = false;
      TGA_UNROLL for (int u = 0; u < NQ; ++u) total[u] = Vec<A>{};
      TGA_UNROLL for (int j = 0; j < KEYS; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) {
        const Vec<A> p = exp2<A, true>(load(scores + j * kBlock + u * W) - load(shift + u * W));
        total[u] += p;
        take(j, u, p);
      }
      TGA_UNROLL for (int u = 0; u < NQ; ++u) exceeds |= any_greater(total[u], set1<A>(1));
      if (__builtin_expect(raised || !exceeds, 1)) break;
      raise_shift(scores, KEYS, total);
    }
    TGA_UNROLL for (int u = 0; u < NQ; ++u) store(sum + u * W, load(sum + u * W) + total[u]);
  }

  // Adds `count` keys, a multiple of kMicroKeys; `first`: to nothing.
  void add_keys(const A* const* k, const A* const* v, const LogitTile<A>& logits, int count, bool first,
                Prefetch& prefetch) const {
    alignas(kVectorBytes) A scores[kMicroKeys * kBlock];
    for (int i = 0; i < count; i += kMicroKeys) {
      prefetch.micro_tile(0);
      Vec<A> s[kMicroKeys][NQ];
      TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] =
          load(logits.data + static_cast<int64_t>(logits.row[i + j]) * kBlock + u * W);
      add_dot<A, A, NQ>(s, k + i, q, head_dim);
      prefetch.micro_tile(1);
      TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u)
          store(scores + j * kBlock + u * W, s[j][u]);
      prefetch.micro_tile(2);
      if (first && i == 0) start(scores, kMicroKeys);
      softmax<kMicroKeys>(scores, [&](int j, int u, Vec<A> p) { s[j][u] = p; });
      prefetch.micro_tile(3), prefetch.micro_tile(4);
      add_outer<A, A, NQ>(o, s, v + i, value_dim);
    }
  }
};
