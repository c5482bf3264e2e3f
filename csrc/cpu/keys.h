// SPDX-License-Identifier: BSD-3-Clause
//
// The keys one batch entry attends to, in order. A mask that is the same for all queries is applied here, once: keys it
// excludes are never read, so they cost nothing and may hold anything. The list is padded to whole micro-tiles with a row
// of zeros whose logit is -inf.

template <class T, class A>
struct Keys {
  int count = 0;     // attended
  int padded = 0;    // a multiple of the micro-tile
  int32_t* key;      // [padded] position
  int32_t* table_row;  // [padded] row of the logit table
  const A** k;       // [padded] rows of key and value in the arithmetic type
  const A** v;

  Keys(const Problem& p, Carver& c) {
    const int64_t room = p.k_len + kMicroKeys;
    key = c.take<int32_t>(room);
    table_row = c.take<int32_t>(room);
    k = c.take<const A*>(room);
    v = c.take<const A*>(room);
    zeros_ = c.take<A>(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
    packed_k_ = in_place(p.key, p.head_dim) ? nullptr : c.take<A>(p.k_len * p.head_dim);
    packed_v_ = in_place(p.value, p.value_dim) ? nullptr : c.take<A>(p.k_len * p.value_dim);
  }

  // `mask` points at the first key of this batch entry and head, or is null.
  void list(const Problem& p, const uint8_t* mask, const T* k_base, const T* v_base, bool has_table) {
    int n = 0;
    for (int32_t j = 0; j < p.k_len; ++j) {
      key[n] = j;
      n += !mask || mask[j * p.mask.col];
    }
    count = n;
    padded = (n + kMicroKeys - 1) / kMicroKeys * kMicroKeys;
    for (int i = 0; i < n; ++i) table_row[i] = has_table ? key[i] : 0;
    rows(k_base, p.key, p.head_dim, packed_k_, k);
    rows(v_base, p.value, p.value_dim, packed_v_, v);
    for (int64_t d = 0; d < p.head_dim || d < p.value_dim; ++d) zeros_[d] = 0;
    for (int i = n; i < padded; ++i) {
      key[i] = 0;
      table_row[i] = has_table ? static_cast<int32_t>(p.k_len) : 1;
      k[i] = v[i] = zeros_;
    }
  }

 private:
  // Rows of the arithmetic type that lie close together are read where they are. Others are copied once per batch entry:
  // rows far apart share few cache sets, and every sub-block of queries reads them again.
  static bool in_place(const View& v, int64_t dim) { return sizeof(T) == sizeof(A) && v.row >= 0 && v.row <= 2 * dim; }

  void rows(const T* base, const View& v, int64_t dim, A* packed, const A** out) const {
    for (int i = 0; i < count; ++i) {
      const T* src = base + key[i] * v.row;
      if constexpr (sizeof(T) == sizeof(A)) {
        if (!packed) {
          out[i] = src;
          continue;
        }
      }
      A* dst = packed + i * dim;
      for (int64_t d = 0; d < dim; d += kLanes<A>) {
        const int n = static_cast<int>(dim - d < kLanes<A> ? dim - d : kLanes<A>);
        store_n(dst + d, load_n(src + d, n), n);
      }
      out[i] = dst;
    }
  }

  A* zeros_;     // [max(head_dim, value_dim)]
  A* packed_k_;  // [k_len, head_dim], [k_len, value_dim], null where rows are read in place
  A* packed_v_;
};
