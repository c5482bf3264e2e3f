// SPDX-License-Identifier: BSD-3-Clause
//
// Forward for a handful of queries per key/value head (pointwise attention over templates, decoding one token). A lane per
// query would leave most lanes idle, so here a lane is a dimension: scores are horizontal sums, kLanes of them at a time.
// Keys come in blocks that stay in the first-level cache until every query has read them and their values, so memory is
// read once, in order. The formulas are those of forward_block.h.

// Keys of a row that are fetched all at once, while the row before is computed. Those of longer rows are fetched by the
// block.
constexpr int64_t kFewKeys = 32;

// Asks for the next row's keys and values.
template <class T>
static inline void prefetch_keys(const Problem& p, const Offsets& next) {
  if (p.k_len > kFewKeys) return;
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    Prefetch prefetch;
    prefetch.keys(at<const T>(p.key, next.key, head), p.key, p.k_len, p.head_dim);
    prefetch.keys(at<const T>(p.value, next.value, head), p.value, p.k_len, p.value_dim);
    prefetch.all();
  }
}

// f(batch, row) for every row of a unit, whose successor is being fetched meanwhile.
template <class T, class F>
static inline void for_rows(const Problem& p, int64_t outer, int64_t begin, int64_t end, const F& f) {
  Offsets next(p, outer * p.rows + begin);
  for (int64_t r = begin; r < end; ++r) {
    const Offsets batch = next;
    if (r + 1 < end) {
      next = Offsets(p, outer * p.rows + r + 1);
      prefetch_keys<T>(p, next);
    }
    f(batch, r);
  }
}

// Scores and sums of some queries over one block of keys.
template <class T, class A>
class KeyBlock {
 public:
  static constexpr int W = kLanes<A>;
  // A tile is queries x keys = kLanes sums; this many queries read a key vector together, fewer where there are fewer.
  static constexpr int kQueries = W >= 16 ? 4 : W >= 4 ? 2 : 1;

  // Keys of a block: rows of a key or value, as they lie in memory, fill half of a first-level cache of 32 KiB.
  static int64_t most_keys_of(const Problem& p) {
    const int64_t bytes = (p.head_dim > p.value_dim ? p.head_dim : p.value_dim) * static_cast<int64_t>(sizeof(T));
    const int64_t keys = (16 << 10) / (bytes > 0 ? bytes : 1) / W * W;
    return keys < W ? W : keys < 256 ? keys : 256;
  }

  KeyBlock(const Problem& p, int queries, Carver& c)
      : most_keys(most_keys_of(p)), p_(p), queries_(queries), stride_(most_keys + W), dim_(padded(p.head_dim)) {
    while ((turns_ + 1) * 2 * kQueries <= queries) turns_ = turns_ * 2 + 1;
    key = c.take<int32_t>(stride_ + kLanes<float>);  // indices_of_set writes whole vectors
    score_ = c.take<A>((queries + kQueries) * stride_);
    query_ = c.take<A>((queries + kQueries) * dim_);
    zeros_ = c.take<T>(p.head_dim + W);
    differs_ = p.mask.data && (p.mask.row != 0 || p.mask.head != 0);
    differs_ |= p.is_causal && p.q_len > 1;
  }

  static int64_t padded(int64_t dim) { return (dim + W - 1) / W * W; }
  static int dims(int64_t dim, int64_t d) { return static_cast<int>(dim - d < W ? dim - d : W); }

  // Once for all that follows.
  void prepare(const Lanes& lanes) {
    lanes_ = &lanes;
    __builtin_memset(query_ + queries_ * dim_, 0, sizeof(A) * kQueries * dim_);
    __builtin_memset(zeros_, 0, sizeof(T) * (p_.head_dim + W));
  }

  // For one batch entry and key/value head, whose first head is `head`.
  void start(const Offsets& batch, int64_t head) {
    batch_ = &batch, head_ = head;
    const Vec<A> factor = set1<A>(static_cast<A>(p_.scale * kLog2E));
    for (int i = 0; i < queries_; ++i) {
      const T* query = at<const T>(p_.query, batch.query, head) + lanes_->lane[i].offset(p_.query);
      for (int64_t d = 0; d < p_.head_dim; d += W)
        store(query_ + i * dim_ + d, load_n(query + d, dims(p_.head_dim, d)) * factor);
    }
  }

  // Elements from a row of this block to the one in its place in the block after it, which is fetched meanwhile; 0: none.
  struct Ahead {
    int64_t key, value;
  };

  // Lists the keys of `block` that some query attends to, and fills the scores.
  void fill(const Visibility<int64_t>& visible, const Range<int64_t>& block, const Ahead& ahead, const T* keys) {
    list(visible, block);
    ahead_ = ahead;
    if (queries_ * count < W)
      add_single(keys);  // a tile would be mostly empty
    else if (queries_ == 1)
      add_tiles<1>(keys);
    else
      add_tiles<kQueries>(keys);
    for (int i = 0; i < queries_; ++i) {
      A* s = scores(i);
      const int64_t offset = batch_->bias + head_ * p_.bias.head + lanes_->lane[i].offset(p_.bias);
      if (p_.bias.data)
        for (int j = 0; j < count; ++j) s[j] += bias_logit<T, A>(p_, offset + key[j] * p_.bias.col);
      if (differs_)
        for (int j = 0; j < count; ++j)
          if (!attends(visible, i, key[j])) s[j] = -kInf<A>;
      for (int j = count; j < count + W; ++j) s[j] = -kInf<A>;
    }
  }

  A* scores(int i) const { return score_ + i * stride_; }

  // o[query][..] += scores * values, for queries i .. i + QB and NV vectors of dimensions from d on, `n` of the last.
  template <int QB, int NV>
  void add_values(int i, const T* values, int64_t d, int n, A* const* o) const {
    Vec<A> x[QB][NV];
    TGA_UNROLL for (int q = 0; q < QB; ++q) TGA_UNROLL for (int v = 0; v < NV; ++v) x[q][v] = load(o[q] + d + v * W);
    for (int j = 0; j < count; ++j) {
      const T* row = values + key[j] * p_.value.row + d;
      const int64_t next = fetches(i / QB, j) ? ahead_.value : 0;
      // Before the loads: the compiler takes a prefetch for a write to memory and would load a factor for every product.
      if (next != 0) TGA_UNROLL for (int v = 0; v < NV; ++v) __builtin_prefetch(row + v * W + next, 0, 2);
      Vec<A> factor[QB];
      TGA_UNROLL for (int q = 0; q < QB; ++q) factor[q] = set1<A>(scores(i + q)[j]);
      TGA_UNROLL for (int v = 0; v < NV; ++v) {
        const Vec<A> y = load_n(row + v * W, NV > 1 ? W : n);
        TGA_UNROLL for (int q = 0; q < QB; ++q) x[q][v] = fma(factor[q], y, x[q][v]);
      }
    }
    TGA_UNROLL for (int q = 0; q < QB; ++q) TGA_UNROLL for (int v = 0; v < NV; ++v) store(o[q] + d + v * W, x[q][v]);
  }

  const int64_t most_keys;
  int count = 0;  // listed
  int32_t* key;   // [count]

 private:
  bool attends(const Visibility<int64_t>& visible, int i, int64_t j) const {
    const Lane lane = lanes_->lane[i];
    if (!visible.sees(lane.row, j)) return false;
    return !p_.mask.data || at<const uint8_t>(p_.mask, batch_->mask, head_)[lane.offset(p_.mask) + j * p_.mask.col];
  }

  void list(const Visibility<int64_t>& visible, const Range<int64_t>& block) {
    const int32_t first = static_cast<int32_t>(block.begin);
    count = 0;
    if (differs_) {
      for (int32_t j = first; j < block.end; ++j) {
        bool any = false;
        for (int i = 0; i < queries_ && !any; ++i) any = attends(visible, i, j);
        key[count] = j;
        count += any;
      }
    } else if (p_.mask.data) {
      const uint8_t* mask = at<const uint8_t>(p_.mask, batch_->mask, head_);
      count = indices_of_set(mask + first * p_.mask.col, p_.mask.col, block.size(), key);
      for (int j = 0; j < count; ++j) key[j] += first;
    } else {
      count = static_cast<int>(block.size());
      for (int j = 0; j < count; ++j) key[j] = first + j;
    }
  }

  // Whether the `pass`-th over the block fetches beside its `item`. The passes take turns, so that what is fetched comes
  // evenly: a block's worth at once would fill the queue of a first-level cache and stop the products.
  bool fetches(int pass, int item) const { return ((item ^ pass) & turns_) == 0; }

  // The same sums as of a tile, one by one.
  void add_single(const T* keys) {
    for (int i = 0; i < queries_; ++i)
      for (int j = 0; j < count; ++j) {
        Vec<A> x{};
        for (int64_t d = 0; d < p_.head_dim; d += W)
          x = fma(load(query_ + i * dim_ + d), load_n(keys + key[j] * p_.key.row + d, dims(p_.head_dim, d)), x);
        scores(i)[j] = sum_lanes(x);
      }
  }

  // QB queries x W / QB keys at a time, whose W sums become one vector.
  template <int QB>
  void add_tiles(const T* keys) {
    constexpr int KB = W / QB;
    for (int j = count; j < count + KB; ++j) key[j] = -1;  // rows of zeros
    for (int i = 0; i < queries_; i += QB)
      for (int j = 0; j < count; j += KB) {
        A sums[W];
        store(sums, tile<QB, KB>(query_ + i * dim_, key + j, keys, fetches(i / QB, j / KB) ? ahead_.key : 0));
        TGA_UNROLL for (int a = 0; a < QB; ++a) __builtin_memcpy(scores(i + a) + j, sums + a * KB, sizeof(A) * KB);
      }
  }
  template <int QB, int KB>
  Vec<A> tile(const A* q, const int32_t* listed, const T* keys, int64_t next) const {
    Vec<A> x[W] = {};
    const T* row[KB];
    TGA_UNROLL for (int b = 0; b < KB; ++b) row[b] = listed[b] < 0 ? zeros_ : keys + listed[b] * p_.key.row;
    const auto add = [&](int64_t d, int n) {
      Vec<A> y[QB];
      TGA_UNROLL for (int a = 0; a < QB; ++a) y[a] = load(q + a * dim_ + d);
      TGA_UNROLL for (int b = 0; b < KB; ++b) {
        if (next != 0) __builtin_prefetch(row[b] + d + next, 0, 2);
        const Vec<A> k = load_n(row[b] + d, n);
        TGA_UNROLL for (int a = 0; a < QB; ++a) x[a * KB + b] = fma(y[a], k, x[a * KB + b]);
      }
    };
    int64_t d = 0;
    for (; d + W <= p_.head_dim; d += W) add(d, W);
    if (d < p_.head_dim) add(d, static_cast<int>(p_.head_dim - d));
    return sums_of_lanes<A>(x);
  }

  const Problem& p_;
  const int queries_;
  const int64_t stride_, dim_;  // between scores, and between queries
  bool differs_;                // queries attend to different keys
  A* score_;                    // [queries, and a tile more][stride]
  A* query_;                    // [queries, and a tile more][dim], times scale * log2(e); zeros past the queries
  T* zeros_;                    // [head_dim and a vector]
  const Lanes* lanes_ = nullptr;
  const Offsets* batch_ = nullptr;
  int64_t head_ = 0;
  Ahead ahead_{};
  int turns_ = 0;  // a power of two less one: at most as many as there are kQueries in the queries
};

template <class T, class A>
class FewQueriesForward {
 public:
  static constexpr int W = kLanes<A>;

  FewQueriesForward(const Problem& p, Carver& c)
      : p_(p),
        group_(p.heads / p.kv_heads),
        queries_(static_cast<int>(group_ * p.q_len)),
        stride_(KeyBlock<T, A>::padded(p.value_dim) + 2),
        block_(p, queries_, c),
        tiny_(p, c),
        states_(c.take<A>(queries_ * stride_)) {}

  void run(const ForwardUnitOfWork& w) {
    lanes_.fill(0, queries_, p_.q_len, 1);
    block_.prepare(lanes_);
    tiny_.prepare();
    for_rows<T>(p_, w.outer, w.row_begin, w.row_end, [&](const Offsets& batch, int64_t r) {
      const Visibility<int64_t> visible = visibility(p_, batch.key_lengths);
      if (TinyRow<T, A>::fits(p_)) return run_tiny_row(batch, visible);
      const Range<int64_t> keys = visible.keys_of(lanes_.rows).within(w.keys);
      for (int64_t kv_head = 0; kv_head < p_.kv_heads; ++kv_head) {
        add_keys(batch, kv_head, visible, keys);
        if (w.state)
          __builtin_memcpy(saved(w, r, kv_head), states_, sizeof(A) * queries_ * stride_);
        else
          finish(batch, kv_head);
      }
    });
  }

  int64_t state_bytes() const { return p_.kv_heads * queries_ * stride_ * static_cast<int64_t>(sizeof(A)); }

  void merge(const ForwardUnitOfWork& w, int64_t parts, int64_t stride) {
    lanes_.fill(0, queries_, p_.q_len, 1);
    for (int64_t r = w.row_begin; r < w.row_end; ++r)
      for (int64_t kv_head = 0; kv_head < p_.kv_heads; ++kv_head) {
        const char* first = reinterpret_cast<const char*>(saved(w, r, kv_head));
        __builtin_memcpy(states_, first, sizeof(A) * queries_ * stride_);
        for (int64_t part = 1; part < parts; ++part)
          for (int i = 0; i < queries_; ++i) add_state(i, reinterpret_cast<const A*>(first + part * stride) + i * stride_);
        finish(Offsets(p_, w.outer * p_.rows + r), kv_head);
      }
  }

 private:
  // What a query's keys add up to: 2^shift * (sum, o).
  A* o(int i) const { return states_ + i * stride_; }
  A& sum(int i) const { return states_[(i + 1) * stride_ - 2]; }
  A& shift(int i) const { return states_[(i + 1) * stride_ - 1]; }
  A* saved(const ForwardUnitOfWork& w, int64_t r, int64_t kv_head) const {
    return reinterpret_cast<A*>(w.state + (r - w.row_begin) * state_bytes()) + kv_head * queries_ * stride_;
  }

  void run_tiny_row(const Offsets& batch, const Visibility<int64_t>& visible) {
    for (int64_t head = 0; head < p_.heads; ++head) {
      const int g = static_cast<int>(head % tiny_.heads);
      if (g == 0) tiny_.add_keys(batch, visible, head);
      tiny_.add_values(g, o(0));
      sum(0) = tiny_.sum(g), shift(0) = tiny_.shift(g);
      finish(batch, head);
    }
  }

  void add_keys(const Offsets& batch, int64_t kv_head, const Visibility<int64_t>& visible, const Range<int64_t>& keys) {
    for (int i = 0; i < queries_; ++i) {
      for (int64_t d = 0; d < stride_ - 2; d += W) store(o(i) + d, Vec<A>{});
      sum(i) = 0, shift(i) = kLowest<A>;
    }
    const int64_t step = block_.most_keys;
    block_.start(batch, kv_head * group_);
    for (int64_t first = keys.begin; first < keys.end; first += step) {
      block_.fill(visible, Range<int64_t>{first, first + step}.within(keys), ahead(first, keys, kv_head),
                  at<const T>(p_.key, batch.key, kv_head));
      for (int i = 0; i < queries_; ++i) softmax(i);
      add_values(at<const T>(p_.value, batch.value, kv_head));
    }
  }

  // The next block is this head's, or the first of the next head.
  typename KeyBlock<T, A>::Ahead ahead(int64_t first, const Range<int64_t>& keys, int64_t kv_head) const {
    const int64_t next = first + block_.most_keys;
    if (next < keys.end) return {block_.most_keys * p_.key.row, block_.most_keys * p_.value.row};
    if (kv_head + 1 == p_.kv_heads || p_.k_len <= kFewKeys) return {};
    const int64_t back = first - keys.begin;
    return {p_.key.head - back * p_.key.row, p_.value.head - back * p_.value.row};
  }

  // Scores of the block to probabilities, their sum to the query's.
  void softmax(int i) {
    A* s = block_.scores(i);
    Vec<A> each = set1<A>(shift(i));
    for (int j = 0; j < block_.count; j += W) each = max(load(s + j), each);  // but for a NaN, which enters the sums
    const A highest = max_lane(each);
    if (highest > shift(i) && sum(i) == 0) {
      shift(i) = highest;  // the sums are still zeros
    } else if (highest > shift(i)) {
      const Vec<A> factor = exp2<A>(set1<A>(shift(i)) - set1<A>(highest));
      for (int64_t d = 0; d < stride_ - 2; d += W) store(o(i) + d, load(o(i) + d) * factor);
      sum(i) *= factor[0];
      shift(i) = highest;
    }
    Vec<A> total{};
    for (int j = 0; j < block_.count; j += W) {
      const Vec<A> p = exp2<A>(load(s + j) - set1<A>(shift(i)));
      total += p;
      store(s + j, p);
    }
    sum(i) += sum_lanes(total);
  }

  void add_values(const T* values) {
#if defined(TGA_AVX512)
    constexpr int kWide = 4;  // 4 queries x 4 vectors = 16 accumulators
#else
    constexpr int kWide = 2;
#endif
    const auto some = [&](auto queries, int i) {
      A* result[queries.value];
      for (int q = 0; q < queries.value; ++q) result[q] = o(i + q);
      int64_t d = 0;
      for (; d + kWide * W <= p_.value_dim; d += kWide * W)
        block_.template add_values<queries.value, kWide>(i, values, d, W, result);
      for (; d < p_.value_dim; d += W)
        block_.template add_values<queries.value, 1>(i, values, d, block_.dims(p_.value_dim, d), result);
    };
    int i = 0;
    for (; i + kWide <= queries_; i += kWide) some(std::integral_constant<int, kWide>{}, i);
    for (; i < queries_; ++i) some(std::integral_constant<int, 1>{}, i);
  }

  void add_state(int i, const A* other) {
    const A other_sum = other[stride_ - 2], other_shift = other[stride_ - 1];
    const Vec<A> before = set1<A>(shift(i)), from = set1<A>(other_shift), now = max(before, from);
    const Vec<A> keep = exp2<A>(before - now), take = exp2<A>(from - now);
    for (int64_t d = 0; d < stride_ - 2; d += W) store(o(i) + d, load(o(i) + d) * keep + load(other + d) * take);
    sum(i) = sum(i) * keep[0] + other_sum * take[0];
    shift(i) = now[0];
  }

  // Normalises, gates and stores.
  void finish(const Offsets& batch, int64_t kv_head) {
    const int64_t head = kv_head * group_;
    for (int i = 0; i < queries_; ++i) {
      const Lane lane = lanes_.lane[i];
      const A total = sum(i);
      const bool dead = total == 0;
      at<A>(p_.lse, batch.lse, head)[lane.offset(p_.lse)] =
          dead ? -kInf<A> : static_cast<A>(kLn2) * (shift(i) + log2<A>(set1<A>(total))[0]);
      at<A>(p_.row_max, batch.row_max, head)[lane.offset(p_.row_max)] = shift(i);
      at<A>(p_.row_sum, batch.row_sum, head)[lane.offset(p_.row_sum)] = total;
      const A factor = dead ? 0 : 1 / total;
      if (dead && p_.mean_rows) mean_of_values(at<const T>(p_.value, batch.value, kv_head), o(i));
      const T* gate = at<const T>(p_.gate, batch.gate, head);
      T* out = at<T>(p_.out, batch.out, head) + lane.offset(p_.out);
      for (int d = 0; d < p_.value_dim; d += W) {
        const int n = block_.dims(p_.value_dim, d);
        Vec<A> x = load(o(i) + d);
        if (!(dead && p_.mean_rows)) x *= set1<A>(factor);
        if (gate) x *= sigmoid<A>(load_gate<T, A>(gate + lane.offset(p_.gate), p_.gate, d, n)).value;
        store_n(out + d, x, n);
      }
    }
  }

  // Of all keys, attended or not: a row with no attended key under masked_rows = "mean".
  __attribute__((noinline, cold)) void mean_of_values(const T* values, A* mean) const {
    const Vec<A> weight = set1<A>(1 / static_cast<A>(p_.k_len));
    for (int64_t d = 0; d < p_.value_dim; d += W) {
      Vec<A> x{};
      for (int64_t k = 0; k < p_.k_len; ++k) x += load_n(values + k * p_.value.row + d, block_.dims(p_.value_dim, d));
      store(mean + d, x * weight);
    }
  }

  const Problem& p_;
  const int64_t group_;
  const int queries_;     // of a key/value head
  const int64_t stride_;  // between states
  Lanes lanes_;
  KeyBlock<T, A> block_;
  TinyRow<T, A> tiny_;
  A* states_;  // [query][value_dim, padded; sum; shift]
};
