// SPDX-License-Identifier: BSD-3-Clause
//
// The keys one batch entry attends to, in order: of those that exist and that some query at hand sees, the ones that a mask
// for all queries leaves. The others are never read, so they cost nothing and may hold anything. The list is padded to
// whole micro-tiles with a row of zeros whose logit is -inf.

template <class T, class A>
struct Keys {
  using O = Operand<T, A>;
  int count = 0;       // attended
  int padded = 0;      // a multiple of kKeyGroup
  int32_t* key;        // [padded] position
  int32_t* table_row;  // [padded] row of the logit table
  const O **k, **v;    // [padded] rows of key and value, for products over dimensions (v: backward only, with pairs)
  const O** k_outer;   // rows for products over keys: those of k and v, or, of pairs, [padded / 2] rows that hold two keys
  const O** v_outer;
  bool in_place = false;  // rows of key and value are read where they are

  Keys(const Problem& p, bool backward, Carver& c) {
    const int64_t room = p.k_len + kKeyGroup<T>, widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
    key = c.take<int32_t>(room + kLanes<float>);  // indices_of_set writes whole vectors
    table_row = c.take<int32_t>(room);
    k = c.take<const O*>(room);
    v = c.take<const O*>(room);
    zeros_ = c.take<O>(widest);
    if constexpr (kPairs<T>) {
      k_outer = backward ? c.take<const O*>(room) : nullptr;
      v_outer = backward ? nullptr : c.take<const O*>(room);
      packed_k_ = c.take<O>(p.k_len * operands<T>(p.head_dim));
      packed_v_ = backward ? c.take<O>(p.k_len * operands<T>(p.value_dim)) : nullptr;
      zipped_ = c.take<O>((p.k_len + 1) / 2 * (backward ? p.head_dim : p.value_dim));
    } else {
      k_outer = k, v_outer = v;
      packed_k_ = readable(p.key, p.head_dim) ? nullptr : c.take<A>(p.k_len * p.head_dim);
      packed_v_ = readable(p.value, p.value_dim) ? nullptr : c.take<A>(p.k_len * p.value_dim);
      in_place = readable(p.key, p.head_dim) && readable(p.value, p.value_dim);
    }
  }

  // The keys of `seen`, of which a mask for all queries leaves some; it points at the first key of this batch entry and
  // head.
  void list(const Problem& p, const Range<int64_t>& seen, const uint8_t* mask, const T* k_base, const T* v_base) {
    const bool by_mask = mask && masks_keys(p), has_table = p.bias.data;
    const int32_t first = static_cast<int32_t>(seen.begin);
    const int n = count =
        by_mask ? indices_of_set(mask + first * p.mask.col, p.mask.col, seen.size(), key) : static_cast<int>(seen.size());
    for (int32_t i = 0; i < n; ++i) key[i] = first + (by_mask ? key[i] : i);
    padded = (n + kKeyGroup<T> - 1) / kKeyGroup<T> * kKeyGroup<T>;
    for (int i = 0; i < n; ++i) table_row[i] = has_table ? key[i] : 0;
    for (int64_t d = 0; d < p.head_dim || d < p.value_dim; ++d) zeros_[d] = 0;
    for (int i = n; i < padded; ++i) {
      key[i] = 0;
      table_row[i] = has_table ? static_cast<int32_t>(p.k_len) : 1;
    }
    rows(k_base, p.key, p.head_dim, packed_k_, k);
    if constexpr (kPairs<T>) {
      if (packed_v_) rows(v_base, p.value, p.value_dim, packed_v_, v);
      if (v_outer) zipped_rows(v_base, p.value, p.value_dim, v_outer);
      if (k_outer) zipped_rows(k_base, p.key, p.head_dim, k_outer);
    } else {
      rows(v_base, p.value, p.value_dim, packed_v_, v);
    }
  }

 private:
  // Rows of the arithmetic type that lie close together are read where they are. Others are copied once per batch entry:
  // rows far apart share few cache sets, and every sub-block of queries reads them again.
  static bool readable(const View& v, int64_t dim) { return sizeof(T) == sizeof(A) && v.row >= 0 && v.row <= 2 * dim; }

  void rows(const T* base, const View& v, int64_t dim, O* packed, const O** out) const {
    for (int i = count; i < padded; ++i) out[i] = zeros_;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (!packed) {
        const int64_t stride = v.row;
        for (int i = 0; i < count; ++i) out[i] = base + key[i] * stride;
        return;
      }
    }
    for (int i = 0; i < count; ++i) {
      const T* src = base + key[i] * v.row;
      O* dst = packed + i * operands<T>(dim);
      out[i] = dst;
      if constexpr (kPairs<T>) {
        if (dim % 2) dst[dim / 2] = 0;
        __builtin_memcpy(dst, src, dim * sizeof(T));
      } else {
        for (int64_t d = 0; d < dim; d += kLanes<A>) {
          const int n = static_cast<int>(dim - d < kLanes<A> ? dim - d : kLanes<A>);
          store_n(dst + d, load_n(src + d, n), n);
        }
      }
    }
  }

  void zipped_rows(const T* base, const View& v, int64_t dim, const O** out) const {
    if constexpr (kPairs<T>) {
      for (int i = 0; i < padded; i += 2) {
        O* dst = zipped_ + i / 2 * dim;
        out[i / 2] = i < count ? dst : zeros_;
        if (i < count) zip_rows(base + key[i] * v.row, i + 1 < count ? base + key[i + 1] * v.row : nullptr, dim, dst);
      }
    }
  }

  O* zeros_;     // [max(head_dim, value_dim)]
  O* packed_k_;  // [k_len][operands], null where rows are read in place
  O* packed_v_;
  O* zipped_ = nullptr;  // [(k_len + 1) / 2][dim]
};
