// SPDX-License-Identifier: BSD-3-Clause
//
// Rows of a few keys with one query to a head (pointwise attention over templates): the scores of several heads fill one
// vector, so that one reduction and one exponential serve them all. Lane g * width + j is key j of the g-th of these heads;
// width is k_len, rounded up to a power of two. The sums are those of KeyBlock in few_queries_forward.h, to the last bit.

template <class T, class A>
class TinyRow {
 public:
  static constexpr int W = kLanes<A>;

  static bool fits(const Problem& p) {
    return p.heads == p.kv_heads && p.heads > 1 && p.q_len == 1 && p.k_len > 0 && 2 * p.k_len <= W;
  }

  TinyRow(const Problem& p, Carver& c) : p_(p), dim_((p.head_dim + W - 1) / W * W) {
    while (width_ < p.k_len) width_ *= 2;
    heads = W / width_;
    query_ = c.take<A>(W * dim_);
    zeros_ = c.take<T>((p.head_dim > p.value_dim ? p.head_dim : p.value_dim) + W);
  }

  // Once for all that follows.
  void prepare() {
    __builtin_memset(zeros_, 0, sizeof(T) * ((p_.head_dim > p_.value_dim ? p_.head_dim : p_.value_dim) + W));
  }

  // The probabilities, before they are divided by their sum, of `heads` heads from `head` on.
  void add_keys(const Offsets& batch, const Visibility<int64_t>& visible, int64_t head) {
    if (width_ == 1) add_keys_of<1>(batch, visible, head);
    if (width_ == 2) add_keys_of<2>(batch, visible, head);
    if constexpr (W >= 8)
      if (width_ == 4) add_keys_of<4>(batch, visible, head);
    if constexpr (W >= 16)
      if (width_ == 8) add_keys_of<8>(batch, visible, head);
  }

  // Of the g-th head.
  A sum(int g) const { return sum_[g * width_]; }
  A shift(int g) const { return shift_[g * width_]; }
  void add_values(int g, A* o) const {
    for (int64_t d = 0; d < p_.value_dim; d += W) {
      const int n = dims(p_.value_dim, d);
      Vec<A> x{};
      for (int j = g * width_; j < g * width_ + static_cast<int>(p_.k_len); ++j)
        x = fma(set1<A>(score_[j]), load_n(value_[j] + d, n), x);
      store(o + d, x);
    }
  }

  int heads;  // at once

 private:
  static int dims(int64_t dim, int64_t d) { return static_cast<int>(dim - d < W ? dim - d : W); }

  template <int kWidth>
  void add_keys_of(const Offsets& batch, const Visibility<int64_t>& visible, int64_t head) {
    const T* key[W];
    A logit[W];
    find_rows<kWidth>(batch, visible, head, key, logit);
    Vec<A> x[W] = {};
    for (int64_t d = 0; d < p_.head_dim; d += W) {
      const int n = dims(p_.head_dim, d);
      TGA_UNROLL for (int l = 0; l < W; ++l) x[l] = fma(load(query_ + l / kWidth * dim_ + d), load_n(key[l] + d, n), x[l]);
    }
    const Vec<A> score = sums_of_lanes<A>(x) + load(logit);
    Vec<A> highest = max(score, set1<A>(kLowest<A>));  // but for a NaN, which enters the sums
    butterfly<kWidth / 2>(highest, [](Vec<A> a, Vec<A> b) { return max(a, b); });
    Vec<A> sum = exp2<A>(score - highest);
    store(score_, sum);
    butterfly<kWidth / 2>(sum, [](Vec<A> a, Vec<A> b) { return a + b; });
    store(shift_, highest);
    store(sum_, sum);
  }

  // Where the lanes' keys and values are; rows of zeros for those that are not attended to, whose logit is -inf.
  template <int kWidth>
  void find_rows(const Offsets& batch, const Visibility<int64_t>& visible, int64_t first, const T** key, A* logit) {
    const Vec<A> factor = set1<A>(static_cast<A>(p_.scale * kLog2E));
    const Range<int64_t> seen = visible.keys_of(int64_t{0});
    for (int g = 0; g < W / kWidth; ++g) {
      const int64_t head = first + g < p_.heads ? first + g : p_.heads - 1;
      const T *query = at<const T>(p_.query, batch.query, head), *k = at<const T>(p_.key, batch.key, head);
      const T* v = at<const T>(p_.value, batch.value, head);
      const uint8_t* mask = at<const uint8_t>(p_.mask, batch.mask, head);
      for (int64_t d = 0; d < p_.head_dim; d += W)
        store(query_ + g * dim_ + d, load_n(query + d, dims(p_.head_dim, d)) * factor);
      for (int j = 0, l = g * kWidth; j < kWidth; ++j, ++l, k += p_.key.row, v += p_.value.row) {
        const bool attended = j >= seen.begin && j < seen.end && (!mask || mask[j * p_.mask.col]);
        key[l] = attended ? k : zeros_;
        value_[l] = attended ? v : zeros_;
        logit[l] = attended ? bias_logit<T, A>(p_, batch.bias + head * p_.bias.head + j * p_.bias.col) : -kInf<A>;
      }
    }
  }

  // Every lane gets what f makes of its head's lanes, which are 2 * S.
  template <int S, class F>
  static void butterfly(Vec<A>& x, const F& f) {
    if constexpr (S > 0) {
      x = f(exchange<S>(x, std::make_index_sequence<W>{}), x);
      butterfly<S / 2>(x, f);
    }
  }
  template <int S, size_t... L>
  static Vec<A> exchange(Vec<A> x, std::index_sequence<L...>) {
    return __builtin_shufflevector(x, x, (L ^ S)...);
  }

  const Problem& p_;
  const int64_t dim_;
  int width_ = 1;
  A score_[W], sum_[W], shift_[W];
  const T* value_[W];
  A* query_;  // [heads at once][dim_], times scale * log2(e)
  T* zeros_;  // [max(head_dim, value_dim) and a vector]
};
