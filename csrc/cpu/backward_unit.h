// SPDX-License-Identifier: BSD-3-Clause
//
// The loops around BackwardBlock: preparing the lanes of a row, and storing what it accumulated.

template <class T, class A, int NQ>
class BackwardUnit {
 public:
  static constexpr int W = kLanes<A>, kBlock = NQ * W;
  using O = Operand<T, A>;

  BackwardUnit(const Problem& p, int max_lanes, int64_t rows, Carver& c)
      : p_(p),
        head_dim_(static_cast<int>(p.head_dim)),
        value_dim_(static_cast<int>(p.value_dim)),
        queries_(p.heads / p.kv_heads * p.q_len),
        max_lanes_(max_lanes),
        k_stride_(row_stride<A>(p.head_dim)),
        v_stride_(row_stride<A>(p.value_dim)),
        table_(p, kBlock, max_lanes, c),
        attended_(p, kBlock, max_lanes, c),
        keys_(p, true, c) {
    const int64_t padded_keys = p.k_len + kKeyGroup<T>;
    d_k_stride_ = padded_keys * k_stride_;
    d_v_stride_ = padded_keys * v_stride_;
    // With a table the rows are the inner loop, so each row keeps its accumulators over the super-blocks.
    const int64_t slots = p.bias.data && queries_ > max_lanes ? rows : 1;
    d_table_ = c.take<A>(p.d_bias.data ? max_lanes / kBlock * table_.stride : 0);
    d_k_ = c.take<A>(p.d_key.data ? slots * d_k_stride_ : 0);
    d_v_ = c.take<A>(p.d_value.data ? slots * d_v_stride_ : 0);
    d_mean_ = c.take<A>(slots * p.value_dim);
    q_ = c.take<O>(max_lanes * operands<T>(p.head_dim));
    d_o_ = c.take<O>(max_lanes * operands<T>(p.value_dim));
    d_q_ = c.take<A>(p.d_query.data ? max_lanes * p.head_dim : 0);
    q_rows_ = c.take<O>(operands<T>(max_lanes) * k_stride_);
    d_o_rows_ = c.take<O>(operands<T>(max_lanes) * v_stride_);
    shift_ = c.take<A>(max_lanes);
    minus_delta_ = c.take<A>(max_lanes);
    d_o_plain_ = c.take<A>(kBlock * v_stride_);
    if constexpr (kPairs<T>)
      pair_rows_ = c.take<T>(kBlock * pair_row_stride(head_dim_ > value_dim_ ? head_dim_ : value_dim_));
    probs_ = c.take<O>(kTileKeys * operands<T>(kBlock));
    d_scores_ = c.take<O>(kTileKeys * operands<T>(kBlock));
  }

  void run(const BackwardUnitOfWork& w) {
    head_ = w.kv_head * (p_.heads / p_.kv_heads);
    const Offsets shared(p_, w.outer * p_.rows);
    if (!p_.bias.data) {
      build_table<T>(table_, p_, shared, head_, lanes_, {});
      for (int64_t r = w.row_begin; r < w.row_end; ++r)
        for (int64_t first = w.first_query; first < w.end_query; first += max_lanes_) {
          lanes_.fill(first, min(first + max_lanes_, w.end_query), p_.q_len, kBlock);
          run_row(w, r, first, 0);
        }
      return;
    }
    const bool several = w.end_query - w.first_query > max_lanes_;
    for (int64_t first = w.first_query; first < w.end_query; first += max_lanes_) {
      lanes_.fill(first, min(first + max_lanes_, w.end_query), p_.q_len, kBlock);
      build_table<T>(table_, p_, shared, head_, lanes_, visibility(p_).keys_of(lanes_.rows));
      if (p_.d_bias.data) __builtin_memset(d_table_, 0, sizeof(A) * lanes_.padded / kBlock * table_.stride);
      for (int64_t r = w.row_begin; r < w.row_end; ++r) run_row(w, r, first, several ? r - w.row_begin : 0);
      if (p_.d_bias.data) store_d_bias(w);
    }
  }

 private:
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

  void run_row(const BackwardUnitOfWork& w, int64_t r, int64_t first_query, int64_t slot) {
    const Offsets batch(p_, w.outer * p_.rows + r);
    const bool first = first_query == w.first_query, last = first_query + max_lanes_ >= w.end_query;
    const uint8_t* mask = at<const uint8_t>(p_.mask, batch.mask, head_);
    const Visibility<int64_t> visible = visibility(p_, batch.key_lengths);
    // All keys of the row: its accumulators stay while the super-blocks change, and without a bias so does the list.
    if (first || p_.bias.data)
      keys_.list(p_, visible.keys_of(Range<int64_t>{0, p_.q_len}), mask, at<const T>(p_.key, batch.key, w.kv_head),
                 at<const T>(p_.value, batch.value, w.kv_head));
    attended_.start(visible, lanes_, keys_.key, keys_.count, mask);
    A* d_k = p_.d_key.data ? d_k_ + slot * d_k_stride_ : nullptr;
    A* d_v = p_.d_value.data ? d_v_ + slot * d_v_stride_ : nullptr;
    A* d_mean = d_mean_ + slot * value_dim_;
    if (first) {
      if (d_k) __builtin_memset(d_k, 0, sizeof(A) * keys_.padded * k_stride_);
      if (d_v) __builtin_memset(d_v, 0, sizeof(A) * keys_.padded * v_stride_);
      __builtin_memset(d_mean, 0, sizeof(A) * value_dim_);
    }
    for (int s = 0; s < lanes_.padded; s += kBlock) {
      prepare_lanes(batch, first_query, s, d_mean);
      prepare_operands(at<const T>(p_.query, batch.query, head_), s);
    }
    if (p_.d_query.data) __builtin_memset(d_q_, 0, sizeof(A) * lanes_.padded * head_dim_);

    Prefetch prefetch;
    if (r + 1 < w.row_end) prefetch_row(prefetch, Offsets(p_, w.outer * p_.rows + r + 1), w.kv_head);
    prefetch_results(prefetch, batch, w.kv_head, last);
    prefetch.spread(keys_.padded, lanes_.padded / kBlock, kKeyGroup<T>);
    add_tiles(prefetch, d_k, d_v);
    if (p_.d_query.data) {
      for (int u = 0; u < lanes_.count; u += W)
        store_transposed<T, A>(d_q_ + u / kBlock * kBlock * head_dim_ + u % kBlock, kBlock, head_dim_,
                               set1<A>(static_cast<A>(p_.scale)), at<T>(p_.d_query, batch.d_query, head_), p_.d_query,
                               lanes_.lane + u, lanes_.count - u);
    }
    if (!last) return;
    const int64_t row = (r - w.row_begin) * p_.k_len;
    const auto store = [&](const A* acc, int64_t stride, int dim, double factor, const A* mean, char* part, T* to,
                           const View& v) {
      if (!acc) return;
      if (part)
        store_rows(acc, stride, dim, factor, mean, reinterpret_cast<A*>(part) + row * dim, dim);
      else
        store_rows(acc, stride, dim, factor, mean, to, v.row);
    };
    store(d_k, k_stride_, head_dim_, p_.scale, nullptr, w.d_key, at<T>(p_.d_key, batch.d_key, w.kv_head), p_.d_key);
    store(d_v, v_stride_, value_dim_, 1, p_.mean_rows ? d_mean : nullptr, w.d_value,
          at<T>(p_.d_value, batch.d_value, w.kv_head), p_.d_value);
  }

  void add_tiles(Prefetch& prefetch, A* d_k, A* d_v) {
    const FlushToZero for_exp2;
    for (int key = 0; key < keys_.padded; key += kTileKeys) {
      const int count = keys_.padded - key < kTileKeys ? keys_.padded - key : kTileKeys;
      for (int s = 0; s < lanes_.padded / kBlock; ++s) {
        const Cover cover = attended_.tile(s, key);
        if (cover == Cover::kEmpty) continue;
        prefetch.tile();
        LogitTile<A> logits = table_.logits(s, keys_.table_row + key);
        if (cover == Cover::kMixed) logits = attended_.hide(logits, count);
        add_tile(s, key, count, logits, prefetch, d_k ? d_k + key * k_stride_ : nullptr,
                 d_v ? d_v + key * v_stride_ : nullptr);
      }
    }
  }

  // One tile of keys for sub-block s.
  void add_tile(int s, int key, int count, const LogitTile<A>& logits, Prefetch& prefetch, A* d_k, A* d_v) const {
    const int left = lanes_.count - s * kBlock, lanes = left < kBlock ? left : kBlock;
    const O *q = q_ + s * kBlock * operands<T>(head_dim_), *d_o = d_o_ + s * kBlock * operands<T>(value_dim_);
    const O *q_rows = q_rows_ + s * operands<T>(kBlock) * k_stride_,
            *d_o_rows = d_o_rows_ + s * operands<T>(kBlock) * v_stride_;
    const A *shift = shift_ + s * kBlock, *minus_delta = minus_delta_ + s * kBlock;
    A* d_q = p_.d_query.data ? d_q_ + s * kBlock * head_dim_ : nullptr;
    A* d_table = p_.d_bias.data ? d_table_ + s * table_.stride : nullptr;
    const int32_t* d_table_row = keys_.table_row + key;
    if constexpr (kPairs<T>)
      PairBackwardBlock<NQ>{
          q,      d_o,       q_rows,    d_o_rows,   shift, minus_delta, d_q,       d_table,
          probs_, d_scores_, head_dim_, value_dim_, lanes, k_stride_,   v_stride_, static_cast<A>(p_.scale * kLog2E)}
          .add_keys(keys_.k + key, keys_.v + key, keys_.k_outer + key / 2, logits, d_table_row, count, d_k, d_v, prefetch);
    else
      BackwardBlock<A, NQ>{q,      d_o,       q_rows,    d_o_rows,   shift, minus_delta, d_q,      d_table,
                           probs_, d_scores_, head_dim_, value_dim_, lanes, k_stride_,   v_stride_}
          .add_keys(keys_.k + key, keys_.v + key, logits, d_table_row, count, d_k, d_v, prefetch);
  }

  void prefetch_row(Prefetch& prefetch, const Offsets& next, int64_t kv_head) const {
    prefetch.keys(at<const T>(p_.key, next.key, kv_head), p_.key, p_.k_len, p_.head_dim);
    prefetch.keys(at<const T>(p_.value, next.value, kv_head), p_.value, p_.k_len, p_.value_dim);
    prefetch.lanes(at<const T>(p_.query, next.query, head_), p_.query, lanes_, p_.head_dim);
    prefetch.lanes(at<const T>(p_.gate, next.gate, head_), p_.gate, lanes_, p_.value_dim);
    prefetch.lanes(at<const T>(p_.out, next.out, head_), p_.out, lanes_, p_.value_dim);
    prefetch.lanes(at<const T>(p_.grad_out, next.grad_out, head_), p_.grad_out, lanes_, p_.value_dim);
    prefetch.lanes(at<const T>(p_.d_gate, next.d_gate, head_), p_.d_gate, lanes_, p_.value_dim);
  }
  // The lines that this row's results go to, so that their stores need not wait for them.
  void prefetch_results(Prefetch& prefetch, const Offsets& batch, int64_t kv_head, bool last) const {
    prefetch.lanes(at<const T>(p_.d_query, batch.d_query, head_), p_.d_query, lanes_, p_.head_dim);
    if (!last) return;
    prefetch.keys(at<const T>(p_.d_key, batch.d_key, kv_head), p_.d_key, p_.k_len, p_.head_dim);
    prefetch.keys(at<const T>(p_.d_value, batch.d_value, kv_head), p_.d_value, p_.k_len, p_.value_dim);
  }

  // For the lanes of the sub-block from lane `first`: shift, -delta and the rows of dO (d_o_plain_), and d_gate, which is
  // final.
  void prepare_lanes(const Offsets& batch, int64_t first_query, int first, A* d_mean) {
    const A* row_max = at<const A>(p_.row_max, batch.row_max, head_) + first_query;
    const A* row_sum = at<const A>(p_.row_sum, batch.row_sum, head_) + first_query;
    const T* gates = at<const T>(p_.gate, batch.gate, head_);
    const T* outs = at<const T>(p_.out, batch.out, head_);
    const T* grad_outs = at<const T>(p_.grad_out, batch.grad_out, head_);
    const A* grad_lse = at<const A>(p_.grad_lse, batch.grad_lse, head_);
    T* d_gates = at<T>(p_.d_gate, batch.d_gate, head_);
    const bool headwise = p_.d_gate.col == 0;
    for (int i = first; i < first + kBlock; ++i) {
      A* row = d_o_plain_ + (i - first) * v_stride_;
      minus_delta_[i] = 0;
      if (i >= lanes_.count) {  // a tail lane contributes nothing
        shift_[i] = row_max[lanes_.count - 1];
        for (int64_t d = 0; d < value_dim_; d += W) store(row + d, Vec<A>{});
        continue;
      }
      const Lane lane = lanes_.lane[i];
      const T *gate = gates ? gates + lane.offset(p_.gate) : nullptr, *out = outs + lane.offset(p_.out);
      const T* grad_out = grad_outs ? grad_outs + lane.offset(p_.grad_out) : nullptr;
      T* d_gate = d_gates ? d_gates + lane.offset(p_.d_gate) : nullptr;
      shift_[i] = row_max[i];
      // Nor does a row with no attended key, whose delta may be infinite.
      const A sum = row_sum[i], r = sum != 0 ? 1 / sum : 0;
      const bool mean = p_.mean_rows && sum == 0;
      Vec<A> delta{}, d_gate_sum{};
      for (int d = 0; d < value_dim_; d += W) {
        const int n = value_dim_ - d < W ? value_dim_ - d : W;
        const Vec<A> dy = grad_out ? load_n(grad_out + d, n) : Vec<A>{}, dyy = dy * load_n(out + d, n);
        Vec<A> d_o = dy;
        if (gate) {
          const Sigmoid<A> g = sigmoid<A>(load_gate<T, A>(gate, p_.gate, d, n));
          d_o *= g.value;
          if (d_gate && !headwise)
            store_n(d_gate + d, dyy * g.complement, n);
          else
            d_gate_sum += dyy * g.complement;
        }
        delta += dyy;
        store(row + d, d_o * set1<A>(r));
        if (mean)
          for (int e = 0; e < n; ++e) d_mean[d + e] += d_o[e] / static_cast<A>(p_.k_len);
      }
      if (d_gate && headwise) store_n(d_gate, set1<A>(sum_lanes(d_gate_sum)), 1);
      const A d_lse = grad_lse ? grad_lse[lane.offset(p_.grad_lse)] : 0;
      if (r != 0) minus_delta_[i] = r * (d_lse - sum_lanes(delta));
    }
  }

  // The operands of the sub-block from lane s: q and dO transposed, and in rows for the key and value gradients. Pairs hold
  // q itself and take the scale after the product, so that it is never rounded to 16 bits.
  void prepare_operands(const T* query, int s) {
    O *q = q_ + s * operands<T>(head_dim_), *d_o = d_o_ + s * operands<T>(value_dim_);
    O *q_rows = q_rows_ + operands<T>(s) * k_stride_, *d_o_rows = d_o_rows_ + operands<T>(s) * v_stride_;
    const Lane* lane = lanes_.lane + s;
    if constexpr (kPairs<T>) {
      copy_rows(query, p_.query, lane, kBlock, head_dim_, pair_rows_);
      transpose_pairs<NQ>(pair_rows_, head_dim_, q);
      zip_lanes(head_dim_, k_stride_, q_rows);
      narrow_rows(d_o_plain_, v_stride_, kBlock, value_dim_, pair_rows_);
      transpose_pairs<NQ>(pair_rows_, value_dim_, d_o);
      zip_lanes(value_dim_, v_stride_, d_o_rows);
    } else {
      const View plain{nullptr, {}, 0, v_stride_, 1};
      Lane numbered[kBlock];
      for (int i = 0; i < kBlock; ++i) numbered[i] = {0, i};
      for (int u = 0; u < kBlock; u += W) {
        transpose_rows<T, A>(query, p_.query, lane + u, head_dim_, times<A>(p_.scale * kLog2E), q + u, kBlock);
        transpose_rows<A, A>(d_o_plain_, plain, numbered + u, value_dim_, times<A>(1), d_o + u, kBlock);
      }
      row_operands(d_o_plain_, plain, numbered, value_dim_, v_stride_, d_o_rows);
      row_operands(query, p_.query, lane, head_dim_, k_stride_, q_rows);
    }
  }

  // The same of pair_rows_, where a row is two lanes paired.
  void zip_lanes(int dim, int64_t stride, O* rows) const {
    if constexpr (kPairs<T>) {
      const bool two = interleaved<A>(dim);
      const int64_t from = pair_row_stride(dim);
      for (int i = 0; i < kBlock; i += 2 + 2 * two) {
        const T *a = pair_rows_ + i * from, *b = a + from, *c = b + two * from, *d = c + two * from;
        O* dst = rows + i / (2 + 2 * two) * stride;
        for (int64_t j = 0; j < dim; j += W) {
          if (two)
            store_alternating<O>(zip(a + j, b + j, dim - j), zip(c + j, d + j, dim - j), dst + 2 * j, stride - 2 * j);
          else
            store(dst + j, zip(a + j, b + j, dim - j));
        }
      }
    }
  }

  // src[lane i] of kBlock lanes as rows; two lanes to a row, alternating element by element, where rows interleave.
  template <class S>
  void row_operands(const S* base, const View& v, const Lane* lane, int dim, int64_t stride, A* rows) const {
    const bool two = interleaved<A>(dim);
    for (int i = 0; i < kBlock; i += 1 + two) {
      const S *a = base + lane[i].offset(v), *b = base + lane[i + two].offset(v);
      A* dst = rows + i / (1 + two) * stride;
      for (int d = 0; d < dim; d += W) {
        const int n = dim - d < W ? dim - d : W;
        if (two)
          store_alternating<A>(load_n(a + d, n), load_n(b + d, n), dst + 2 * d, stride - 2 * d);
        else
          store(dst + d, load_n(a + d, n));
      }
    }
  }

  // Accumulated rows of the listed keys, to d_key or d_value or a part of them; times `factor`; keys that are not listed
  // get `mean` (or 0).
  template <class R>
  void store_rows(const A* acc, int64_t stride, int dim, double factor, const A* mean, R* base, int64_t base_stride) const {
    const bool two = interleaved<A>(dim);
    for (int64_t key = 0, i = 0; key < p_.k_len; ++key) {
      const bool listed = i < keys_.count && keys_.key[i] == key;
      for (int d = 0; d < dim; d += W) {
        const int n = dim - d < W ? dim - d : W;
        Vec<A> x{};
        if (listed) x = (two ? load_pair_sums(acc + i * stride + 2 * d, stride - 2 * d) : load(acc + i * stride + d));
        x *= set1<A>(static_cast<A>(factor));
        if (mean) x += load_n(mean + d, n);
        store_n(base + key * base_stride + d, x, n);
      }
      i += listed;
    }
  }

  // Transposes d_table_ into this unit's slice of d_bias. Lanes that share an element (a bias broadcast over queries, keys
  // or the heads of a group) are added in order; the launcher has zeroed the slice then.
  void store_d_bias(const BackwardUnitOfWork& w) const {
    const Offsets batch(p_, w.outer * p_.rows);
    A* base = at<A>(p_.d_bias, batch.d_bias, head_) + w.partial;
    const bool add = !d_bias_is_stored(p_);
    for (int u = 0; u < lanes_.count; u += W) {
      const A* t = d_table_ + u / kBlock * table_.stride + u % kBlock;
      for (int64_t k = 0; k < p_.k_len; k += W) {
        const int n = static_cast<int>(min(p_.k_len - k, W));
        Vec<A> r[W];
        TGA_UNROLL for (int i = 0; i < W; ++i) r[i] = i < n ? load(t + (k + i) * kBlock) : Vec<A>{};
        transpose<A>(r);
        for (int i = 0; i < W && u + i < lanes_.count; ++i) {
          A* dst = base + lanes_.lane[u + i].offset(p_.d_bias);
          __builtin_prefetch(dst + W * p_.d_bias.row + k, 1);  // of the next lanes, as in transpose_rows
          if (p_.d_bias.col == 0)
            *dst += sum_lanes(r[i]);
          else
            store_n(dst + k, add ? load_n(dst + k, n) + r[i] : r[i], n);
        }
      }
    }
  }

  const Problem& p_;
  const int head_dim_, value_dim_;
  const int64_t queries_;  // of a key/value head
  const int max_lanes_;
  const int64_t k_stride_, v_stride_;
  int64_t d_k_stride_, d_v_stride_;  // between slots
  int64_t head_ = 0;
  Lanes lanes_;
  Table<A> table_;
  Attended<A> attended_;
  Keys<T, A> keys_;
  A* d_table_;               // as table_.data
  A *d_k_, *d_v_;            // [slot][k_len, padded][stride]
  A* d_mean_;                // [slot][value_dim]: what fully masked rows give every value
  O *q_, *d_o_;              // [sub-block][operands of a dimension][kBlock]
  A* d_q_;                   // [sub-block][head_dim][kBlock]
  O *q_rows_, *d_o_rows_;    // [lane, or pair of lanes][stride]
  A *shift_, *minus_delta_;  // [lane]
  A* d_o_plain_;             // [kBlock][v_stride]
  T* pair_rows_ = nullptr;   // [kBlock][pair_row_stride], for pairs only
  O *probs_, *d_scores_;     // [kTileKeys][operands of kBlock]
};
