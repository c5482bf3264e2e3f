// SPDX-License-Identifier: BSD-3-Clause
//
// The loops around ForwardBlock (or PairForwardBlock): preparing a row, and normalising, gating and storing its result.

template <class T, class A, int NQ>
class ForwardUnit {
 public:
  static constexpr int W = kLanes<A>, kBlock = NQ * W;
  using O = Operand<T, A>;
  static constexpr int kKeysAhead = 2 * kTileKeys;
  static constexpr int kLongRow = 512;  // keys; a shorter one is in a cache soon

  ForwardUnit(const Problem& p, int max_lanes, Carver& c)
      : p_(p),
        head_dim_(static_cast<int>(p.head_dim)),
        value_dim_(static_cast<int>(p.value_dim)),
        max_lanes_(max_lanes),
        table_(p, kBlock, max_lanes, c),
        attended_(p, kBlock, max_lanes, c),
        keys_(p, false, c),
        q_(c.take<O>(max_lanes * operands<T>(p.head_dim))),
        o_(c.take<A>(max_lanes * p.value_dim)),
        sum_(c.take<A>(max_lanes)),
        shift_(c.take<A>(max_lanes)),
        mean_(c.take<A>(p.value_dim)) {
    if constexpr (kPairs<T>) rows_ = c.take<T>(kBlock * pair_row_stride(p.head_dim));
  }

  void run(const ForwardUnitOfWork& w) {
    head_ = w.kv_head * (p_.heads / p_.kv_heads);
    lanes_.fill(w.first_query, w.end_query, p_.q_len, kBlock);
    const Offsets shared(p_, w.outer * p_.rows);
    build_table<T>(table_, p_, shared, head_, lanes_, visibility(p_).keys_of(lanes_.rows).within(w.keys));
    Offsets batch(p_, w.outer * p_.rows + w.row_begin);
    for (int64_t r = w.row_begin; r < w.row_end; ++r) {
      const bool last = r + 1 == w.row_end;
      const Offsets next = last ? batch : Offsets(p_, w.outer * p_.rows + r + 1);
      run_row(w, r, batch, next, last);
      batch = next;
    }
  }

  // What a row's keys add up to so far: o_, sum_ and shift_.
  int64_t state_bytes() const { return (value_dim_ + 2) * max_lanes_ * static_cast<int64_t>(sizeof(A)); }

  void merge(const ForwardUnitOfWork& w, int64_t parts, int64_t stride) {
    head_ = w.kv_head * (p_.heads / p_.kv_heads);
    lanes_.fill(w.first_query, w.end_query, p_.q_len, kBlock);
    for (int64_t r = w.row_begin; r < w.row_end; ++r) {
      const Offsets batch(p_, w.outer * p_.rows + r);
      const char* state = w.state + (r - w.row_begin) * state_bytes();
      copy_state([](A* now, const A* saved, int64_t n) { __builtin_memcpy(now, saved, sizeof(A) * n); }, state);
      for (int64_t i = 1; i < parts; ++i) add_state(reinterpret_cast<const A*>(state + i * stride));
      for (int u = 0; u < lanes_.count; u += W) finish(w, batch, u);
    }
  }

 private:
  // copy(part of this object, its place in a state, elements)
  template <class F, class State>
  void copy_state(const F& copy, State* state) {
    using Element = std::conditional_t<std::is_const_v<State>, const A, A>;
    Element* s = reinterpret_cast<Element*>(state);
    copy(sum_, s, max_lanes_);
    copy(shift_, s + max_lanes_, max_lanes_);
    copy(o_, s + 2 * max_lanes_, max_lanes_ * value_dim_);
  }
  void add_state(const A* state) {
    const A *sum = state, *shift = state + max_lanes_, *o = state + 2 * max_lanes_;
    for (int u = 0; u < lanes_.padded; u += W) {
      const Vec<A> before = load(shift_ + u), other = load(shift + u), now = max(before, other);
      const Vec<A> keep = exp2<A>(before - now), take = exp2<A>(other - now);
      store(shift_ + u, now);
      store(sum_ + u, load(sum_ + u) * keep + load(sum + u) * take);
      const int at = u / kBlock * kBlock * value_dim_ + u % kBlock;
      for (int d = 0; d < value_dim_; ++d)
        store(o_ + at + d * kBlock, load(o_ + at + d * kBlock) * keep + load(o + at + d * kBlock) * take);
    }
  }

  void run_row(const ForwardUnitOfWork& w, int64_t r, const Offsets& batch, const Offsets& next, bool last) {
    const T* query = at<const T>(p_.query, batch.query, head_);
    const uint8_t* mask = at<const uint8_t>(p_.mask, batch.mask, head_);
    const Visibility<int64_t> visible = visibility(p_, batch.key_lengths);
    keys_.list(p_, visible.keys_of(lanes_.rows).within(w.keys), mask, at<const T>(p_.key, batch.key, w.kv_head),
               at<const T>(p_.value, batch.value, w.kv_head));
    attended_.start(visible, lanes_, keys_.key, keys_.count, mask);
    for (int first = 0; first < lanes_.padded; first += kBlock) {
      O* q = q_ + first * operands<T>(head_dim_);
      if constexpr (kPairs<T>) {
        copy_rows(query, p_.query, lanes_.lane + first, kBlock, head_dim_, rows_);
        transpose_pairs<NQ>(rows_, head_dim_, q);
      } else {
        for (int u = 0; u < kBlock; u += W)
          transpose_rows<T, A>(query, p_.query, lanes_.lane + first + u, head_dim_, times<A>(p_.scale * kLog2E), q + u,
                               kBlock);
      }
      for (int u = first; u < first + kBlock; u += W) store(sum_ + u, Vec<A>{}), store(shift_ + u, set1<A>(kLowest<A>));
    }
    __builtin_memset(o_, 0, sizeof(A) * lanes_.padded * value_dim_);

    Prefetch prefetch;
    if (!last) {
      prefetch.keys(at<const T>(p_.key, next.key, w.kv_head), p_.key, p_.k_len, p_.head_dim);
      prefetch.keys(at<const T>(p_.value, next.value, w.kv_head), p_.value, p_.k_len, p_.value_dim);
      prefetch.lanes(at<const T>(p_.query, next.query, head_), p_.query, lanes_, p_.head_dim);
      prefetch.lanes(at<const T>(p_.gate, next.gate, head_), p_.gate, lanes_, p_.value_dim);
    } else if (lanes_.padded == kBlock && keys_.in_place && keys_.count > kLongRow) {
      // One sub-block uses every key once, at the speed of memory: so it asks for the keys of the tile after the next.
      const int64_t ahead = keys_.key[0] + kKeysAhead, rows = keys_.key[keys_.count - 1] + 1 - ahead;
      prefetch.keys(at<const T>(p_.key, batch.key, w.kv_head) + ahead * p_.key.row, p_.key, rows, p_.head_dim);
      prefetch.keys(at<const T>(p_.value, batch.value, w.kv_head) + ahead * p_.value.row, p_.value, rows, p_.value_dim);
    }
    prefetch.lanes(at<const T>(p_.out, batch.out, head_), p_.out, lanes_, p_.value_dim);
    prefetch.spread(keys_.padded, lanes_.padded / kBlock, kKeyGroup<T>);
    add_tiles(prefetch);
    if (w.state)
      return copy_state([](const A* now, A* saved, int64_t n) { __builtin_memcpy(saved, now, sizeof(A) * n); },
                        w.state + (r - w.row_begin) * state_bytes());
    for (int u = 0; u < lanes_.count; u += W) finish(w, batch, u);
  }

  void add_tiles(Prefetch& prefetch) {
    const FlushToZero for_exp2;
    bool started[kMaxLanes / kBlock] = {};
    for (int first = 0; first < keys_.padded; first += kTileKeys) {
      const int count = keys_.padded - first < kTileKeys ? keys_.padded - first : kTileKeys;
      for (int s = 0; s < lanes_.padded / kBlock; ++s) {
        const Cover cover = attended_.tile(s, first);
        if (cover == Cover::kEmpty) continue;
        prefetch.tile();
        LogitTile<A> logits = table_.logits(s, keys_.table_row + first);
        if (cover == Cover::kMixed) logits = attended_.hide(logits, count);
        const bool start = !std::exchange(started[s], true);
        const ForwardBlock<A, NQ> block = this->block(s);
        if constexpr (kPairs<T>)
          PairForwardBlock<NQ>{q_ + s * kBlock * operands<T>(head_dim_), block, static_cast<A>(p_.scale * kLog2E)}.add_keys(
              keys_.k + first, keys_.v_outer + first / 2, logits, count, start, prefetch);
        else
          block.add_keys(keys_.k + first, keys_.v_outer + first, logits, count, start, prefetch);
      }
    }
  }

  ForwardBlock<A, NQ> block(int s) const {
    const A* q = nullptr;
    if constexpr (!kPairs<T>) q = q_ + s * kBlock * head_dim_;
    return {q, o_ + s * kBlock * value_dim_, sum_ + s * kBlock, shift_ + s * kBlock, head_dim_, value_dim_};
  }

  // Normalises, gates and stores the W lanes from lane u.
  void finish(const ForwardUnitOfWork& w, const Offsets& batch, int u) {
    const int n = lanes_.count - u < W ? lanes_.count - u : W;
    const Lane* lane = lanes_.lane + u;
    A* o = o_ + u / kBlock * kBlock * value_dim_ + u % kBlock;
    const Vec<A> l = load(sum_ + u), m = load(shift_ + u), one = set1<A>(1);
    const auto dead = l == Vec<A>{};  // no key attended
    const Vec<A> lse = (m + log2<A>(l)) * set1<A>(static_cast<A>(kLn2));
    const int64_t at_lane = w.first_query + u;
    store_n(at<A>(p_.lse, batch.lse, head_) + at_lane, dead ? set1<A>(-kInf<A>) : lse, n);
    store_n(at<A>(p_.row_max, batch.row_max, head_) + at_lane, m, n);
    store_n(at<A>(p_.row_sum, batch.row_sum, head_) + at_lane, l, n);

    Vec<A> factor = dead ? Vec<A>{} : one / l;
    if (p_.mean_rows) {
      for (int i = 0; i < n; ++i) {
        if (!dead[i]) continue;
        mean_of_values(at<const T>(p_.value, batch.value, w.kv_head));
        for (int d = 0; d < value_dim_; ++d) o[d * kBlock + i] = mean_[d];
        factor[i] = 1;
      }
    }
    T* out = at<T>(p_.out, batch.out, head_);
    const T* gate = at<const T>(p_.gate, batch.gate, head_);
    for (int d = 0; d < value_dim_; d += W) {
      const int dims = value_dim_ - d < W ? value_dim_ - d : W;
      const auto gate_of = [&](int i) { return load_gate<T, A>(gate + lane[i].offset(p_.gate), p_.gate, d, dims); };
      const auto put = [&](int i, Vec<A> x) { store_n(out + lane[i].offset(p_.out) + d, x, dims); };
      if (2 * dims <= W) {  // two lanes to a vector: half as many sigmoids, a third of the shuffles
        constexpr int H = W / 2;
        Vec<A> r[H];
        TGA_UNROLL for (int i = 0; i < H; ++i) r[i] = i < dims ? load(o + (d + i) * kBlock) * factor : Vec<A>{};
        transpose_halves<A>(r);
        for (int i = 0; i < H && i < n; ++i) {
          if (gate) r[i] *= sigmoid<A>(lower_halves(gate_of(i), gate_of(i + H))).value;
          put(i, r[i]);
          if (i + H < n) put(i + H, upper_half(r[i]));
        }
      } else {
        Vec<A> r[W];
        TGA_UNROLL for (int i = 0; i < W; ++i) r[i] = i < dims ? load(o + (d + i) * kBlock) * factor : Vec<A>{};
        transpose<A>(r);
        for (int i = 0; i < n; ++i) put(i, gate ? r[i] * sigmoid<A>(gate_of(i)).value : r[i]);
      }
    }
  }

  // Over all keys, attended or not: what a softmax over equal logits gives.
  __attribute__((noinline, cold)) void mean_of_values(const T* value) {
    for (int d = 0; d < value_dim_; ++d) mean_[d] = 0;
    for (int64_t k = 0; k < p_.k_len; ++k)
      for (int d = 0; d < value_dim_; ++d) mean_[d] += load_one(value + k * p_.value.row + d);
    for (int d = 0; d < value_dim_; ++d) mean_[d] /= static_cast<A>(p_.k_len);
  }

  const Problem& p_;
  const int head_dim_, value_dim_, max_lanes_;
  int64_t head_ = 0;  // first head of the group
  Lanes lanes_;
  Table<A> table_;
  Attended<A> attended_;
  Keys<T, A> keys_;
  O* q_;             // [sub-block][operands of head_dim][kBlock]
  A* o_;             // [sub-block][value_dim][kBlock]
  A *sum_, *shift_;  // [lane]
  A* mean_;          // [value_dim]
  T* rows_;          // [kBlock][pair_row_stride], for pairs only
};
