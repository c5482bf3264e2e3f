// SPDX-License-Identifier: BSD-3-Clause
//
// Backward for a handful of queries per key/value head. Its forward is few_queries_forward.h; here each query walks the
// keys by itself and keeps a row of scores, the same to the last bit. The formulas are those of backward_block.h.

// One query: its attended keys and their scores.
template <class T, class A>
class QueryScores {
 public:
  QueryScores(const Problem& p, Carver& c)
      : p_(p),
        key(c.take<int32_t>(p.k_len + kLanes<A>)),
        score(c.take<A>(p.k_len + kLanes<A>)),
        query_(c.take<A>(p.head_dim + kLanes<A>)) {}

  // Lists the keys of `seen` that `mask` allows and fills `score` with their logits, in log2 units.
  void fill(const T* query, const T* keys, const Range<int64_t>& seen, const uint8_t* mask, int64_t bias_offset) {
    const A factor = static_cast<A>(p_.scale * kLog2E);
    for (int64_t d = 0; d < p_.head_dim; d += kLanes<A>)
      store(query_ + d, load_n(query + d, dims(p_.head_dim, d)) * set1<A>(factor));
    count = 0;
    for (int32_t j = static_cast<int32_t>(seen.begin); j < seen.end; ++j) {
      if (mask && !mask[j * p_.mask.col]) continue;
      key[count] = j;
      score[count++] =
          dot(query_, keys + j * p_.key.row, p_.head_dim) + bias_logit<T, A>(p_, bias_offset + j * p_.bias.col);
    }
    for (int i = count; i < count + kLanes<A>; ++i) score[i] = -kInf<A>;
  }

  // Replaces the scores by 2^(score - shift).
  void exponentials(A shift) {
    for (int i = 0; i < count; i += kLanes<A>) store(score + i, exp2<A>(load(score + i) - set1<A>(shift)));
  }

  // A row with no attended key under masked_rows = "mean": equal weights for all keys.
  void all_keys_alike() {
    count = static_cast<int>(p_.k_len);
    for (int32_t j = 0; j < count; ++j) key[j] = j, score[j] = 1;
  }

  static int dims(int64_t dim, int64_t d) { return static_cast<int>(dim - d < kLanes<A> ? dim - d : kLanes<A>); }
  static A dot(const A* x, const T* y, int64_t dim) {
    Vec<A> sum{};
    for (int64_t d = 0; d < dim; d += kLanes<A>) sum = fma(load(x + d), load_n(y + d, dims(dim, d)), sum);
    return sum_lanes(sum);
  }

 private:
  const Problem& p_;

 public:
  int count = 0;
  int32_t* key;  // [count]
  A* score;      // [count, padded with -inf]

 private:
  A* query_;  // [head_dim], times scale * log2(e)
};

template <class T, class A>
static inline void fill_scores(QueryScores<T, A>& scores, const Problem& p, const Offsets& batch, int64_t kv_head,
                               int64_t head, Lane lane, const Range<int64_t>& keys) {
  const T* query = at<const T>(p.query, batch.query, head) + lane.offset(p.query);
  const uint8_t* mask = p.mask.data ? at<const uint8_t>(p.mask, batch.mask, head) + lane.offset(p.mask) : nullptr;
  const int64_t bias_offset = batch.bias + head * p.bias.head + lane.offset(p.bias);
  scores.fill(query, at<const T>(p.key, batch.key, kv_head), keys, mask, bias_offset);
}

template <class T, class A>
class FewQueriesBackward {
 public:
  FewQueriesBackward(const Problem& p, Carver& c) : p_(p), scores_(p, c), rows_(p, c), d_scores_(c.take<A>(p.k_len)) {}

  void run(const BackwardUnitOfWork& w) {
    Lanes lanes;
    lanes.fill(0, p_.heads / p_.kv_heads * p_.q_len, p_.q_len, 1);
    partial_ = w.partial;
    const int64_t group = p_.heads / p_.kv_heads;
    for_rows<T>(p_, w.outer, w.row_begin, w.row_end, [&](const Offsets& batch, int64_t) {
      for (int64_t kv_head = 0; kv_head < p_.kv_heads; ++kv_head) {
        rows_.clear(p_);
        for (int i = 0; i < lanes.count; ++i) run_query(batch, kv_head, kv_head * group, lanes.lane[i]);
        rows_.write(p_, batch, kv_head);
      }
    });
  }

 private:
  // Gradients of one batch entry's keys and values, summed over its queries.
  struct KeyValueGradients {
    int64_t k_stride, v_stride;
    A *d_k, *d_v, *d_o, *q;  // [k_len][stride] twice, null if not wanted, [value_dim], [head_dim]

    KeyValueGradients(const Problem& p, Carver& c)
        : k_stride((p.head_dim + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
          v_stride((p.value_dim + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
          d_k(p.d_key.data ? c.take<A>(p.k_len * k_stride) : nullptr),
          d_v(p.d_value.data ? c.take<A>(p.k_len * v_stride) : nullptr),
          d_o(c.take<A>(v_stride)),
          q(c.take<A>(k_stride)) {}
    void clear(const Problem& p) {
      if (d_k) __builtin_memset(d_k, 0, sizeof(A) * p.k_len * k_stride);
      if (d_v) __builtin_memset(d_v, 0, sizeof(A) * p.k_len * v_stride);
    }
    void write(const Problem& p, const Offsets& batch, int64_t kv_head) const {
      write_rows(d_k, k_stride, p.head_dim, p.k_len, at<T>(p.d_key, batch.d_key, kv_head), p.d_key);
      write_rows(d_v, v_stride, p.value_dim, p.k_len, at<T>(p.d_value, batch.d_value, kv_head), p.d_value);
    }
    static void write_rows(const A* rows, int64_t stride, int64_t dim, int64_t count, T* base, const View& v) {
      if (!base) return;
      for (int64_t j = 0; j < count; ++j)
        for (int64_t d = 0; d < dim; d += kLanes<A>)
          store_n(base + j * v.row + d, load(rows + j * stride + d), QueryScores<T, A>::dims(dim, d));
    }
  };

  void run_query(const Offsets& batch, int64_t kv_head, int64_t head, Lane lane) {
    const T* keys = at<const T>(p_.key, batch.key, kv_head);
    const T* values = at<const T>(p_.value, batch.value, kv_head);
    const A sum = at<const A>(p_.row_sum, batch.row_sum, head)[lane.offset(p_.row_sum)];
    const A shift = at<const A>(p_.row_max, batch.row_max, head)[lane.offset(p_.row_max)];
    const A* grad_lse = at<const A>(p_.grad_lse, batch.grad_lse, head);
    fill_scores<T>(scores_, p_, batch, kv_head, head, lane, visibility(p_, batch.key_lengths).keys_of(lane.row));
    scores_.exponentials(shift);
    const bool dead = sum == 0;
    A r = dead ? 0 : 1 / sum;
    if (dead && p_.mean_rows) {
      scores_.all_keys_alike();
      r = 1 / static_cast<A>(p_.k_len);
    }
    A delta = gate_and_delta(batch, head, lane);
    if (grad_lse) delta -= grad_lse[lane.offset(p_.grad_lse)];
    for (int i = 0; i < scores_.count; ++i) {
      const A p = scores_.score[i] * r;
      scores_.score[i] = p;
      d_scores_[i] = dead ? 0 : p * (scores_.dot(rows_.d_o, values + scores_.key[i] * p_.value.row, p_.value_dim) - delta);
    }
    if (p_.d_bias.data) {
      A* d_bias = at<A>(p_.d_bias, batch.d_bias, head) + partial_ + lane.offset(p_.d_bias);
      for (int i = 0; i < scores_.count; ++i) d_bias[scores_.key[i] * p_.d_bias.col] += d_scores_[i];
    }
    add_query_and_key(keys, at<const T>(p_.query, batch.query, head) + lane.offset(p_.query),
                      p_.d_query.data ? at<T>(p_.d_query, batch.d_query, head) + lane.offset(p_.d_query) : nullptr);
    if (!rows_.d_v) return;
    for (int64_t d = 0; d < p_.value_dim; d += kLanes<A>)
      for (int i = 0; i < scores_.count; ++i) {
        A* row = rows_.d_v + scores_.key[i] * rows_.v_stride + d;
        store(row, fma(set1<A>(scores_.score[i]), load(rows_.d_o + d), load(row)));
      }
  }

  // dO into rows_.d_o, d_gate to its place; returns sum_d dY * y.
  A gate_and_delta(const Offsets& batch, int64_t head, Lane lane) {
    const T* gate = at<const T>(p_.gate, batch.gate, head);
    const T* out = at<const T>(p_.out, batch.out, head) + lane.offset(p_.out);
    const T* grad_out = at<const T>(p_.grad_out, batch.grad_out, head);
    T* d_gate = at<T>(p_.d_gate, batch.d_gate, head);
    Vec<A> delta{}, d_gate_sum{};
    for (int d = 0; d < p_.value_dim; d += kLanes<A>) {
      const int n = scores_.dims(p_.value_dim, d);
      const Vec<A> dy = grad_out ? load_n(grad_out + lane.offset(p_.grad_out) + d, n) : Vec<A>{};
      const Vec<A> dyy = dy * load_n(out + d, n);
      Vec<A> d_o = dy;
      if (gate) {
        const Sigmoid<A> g = sigmoid<A>(load_gate<T, A>(gate + lane.offset(p_.gate), p_.gate, d, n));
        d_o *= g.value;
        d_gate_sum += dyy * g.complement;
        if (d_gate && p_.d_gate.col != 0) store_n(d_gate + lane.offset(p_.d_gate) + d, dyy * g.complement, n);
      }
      store(rows_.d_o + d, d_o);
      delta += dyy;
    }
    if (d_gate && p_.d_gate.col == 0) store_n(d_gate + lane.offset(p_.d_gate), set1<A>(sum_lanes(d_gate_sum)), 1);
    return sum_lanes(delta);
  }

  void add_query_and_key(const T* keys, const T* query, T* d_query) {
    const Vec<A> scale = set1<A>(static_cast<A>(p_.scale));
    for (int64_t d = 0; d < p_.head_dim; d += kLanes<A>) {
      const int n = scores_.dims(p_.head_dim, d);
      const Vec<A> q = load_n(query + d, n) * scale;
      Vec<A> d_q{};
      for (int i = 0; i < scores_.count; ++i) {
        const Vec<A> ds = set1<A>(d_scores_[i]);
        d_q = fma(ds, load_n(keys + scores_.key[i] * p_.key.row + d, n), d_q);
        if (!rows_.d_k) continue;
        A* row = rows_.d_k + scores_.key[i] * rows_.k_stride + d;
        store(row, fma(ds, q, load(row)));
      }
      if (d_query) store_n(d_query + d, d_q * scale, n);
    }
  }

  const Problem& p_;
  QueryScores<T, A> scores_;
  KeyValueGradients rows_;
  A* d_scores_;          // [k_len]
  int64_t partial_ = 0;  // of this unit's slice of d_bias, which the launcher has zeroed
};
