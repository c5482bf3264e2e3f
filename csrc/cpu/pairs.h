// SPDX-License-Identifier: BSD-3-Clause
//
// Products of bfloat16 pairs (vdpbf16ps), for bfloat16 tensors where the machine has them. The blocks mirror ForwardBlock
// and BackwardBlock: softmax, sums and accumulators are float; only the operands of the five products are bfloat16, rounded
// once (P, dS and dO). A micro-tile has twice as many keys, since P and dS are paired over keys for O and dQ.

// Elements between rows of `dim` bfloat16 that are read as whole vectors of pairs.
TGA_INLINE int64_t pair_row_stride(int64_t dim) { return (dim + 31) / 32 * 32; }

#if defined(TGA_AVX512_BF16)
constexpr int kPairKeys = 2 * kMicroKeys;

// Lane i = (first[i], second[i]).
TGA_INLINE VecI pair_lanes(VecF first, VecF second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (VecI)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
// Neighbouring lanes paired: dst[i] = (x[2i], x[2i + 1]).
template <int NQ>
TGA_INLINE void store_lane_pairs(Pair* dst, const VecF (&x)[NQ]) {
  if constexpr (NQ == 2) {
    const auto both = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    __builtin_memcpy(dst, &both, sizeof both);
  } else {
    const auto one = _mm512_cvtneps_pbh((__m512)x[0]);
    __builtin_memcpy(dst, &one, sizeof one);
  }
}
// Pairs (a[i], b[i]) for i < n; b may be null, for zeros.
TGA_INLINE VecI zip(const BFloat16* a, const BFloat16* b, int64_t n) {
  const uint32_t exist = lane_mask(static_cast<int>(n < 16 ? n : 16));
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, a));
  const __m512i high = b ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, b)) : _mm512_setzero_si512();
  return (VecI)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
static inline void zip_rows(const BFloat16* a, const BFloat16* b, int64_t dim, Pair* dst) {
  for (int64_t d = 0; d < dim; d += 16)
    _mm512_mask_storeu_epi32(dst + d, lane_mask(static_cast<int>(dim - d < 16 ? dim - d : 16)),
                             (__m512i)zip(a + d, b ? b + d : nullptr, dim - d));
}
// The rows of `count` lanes, zero from `dim` on.
static inline void copy_rows(const BFloat16* base, const View& v, const Lane* lane, int count, int64_t dim,
                             BFloat16* rows) {
  const int64_t stride = pair_row_stride(dim);
  for (int i = 0; i < count; ++i)
    for (int64_t d = 0; d < stride; d += 32) {
      const uint32_t n = d < dim ? lane_mask(static_cast<int>(dim - d)) : 0;
      _mm512_storeu_si512(rows + i * stride + d, _mm512_maskz_loadu_epi16(n, base + lane[i].offset(v) + d));
    }
}
// Float rows to bfloat16 ones, zero from `dim` on.
static inline void narrow_rows(const float* src, int64_t src_stride, int count, int64_t dim, BFloat16* rows) {
  const int64_t stride = pair_row_stride(dim);
  for (int i = 0; i < count; ++i)
    for (int64_t d = 0; d < stride; d += 16)
      store_n(rows + i * stride + d, d < dim ? load_n(src + i * src_stride + d, static_cast<int>(dim - d)) : VecF{}, 16);
}
// dst[d / 2][lane] = (rows[lane][d], rows[lane][d + 1]) for 16 * NQ lanes.
template <int NQ>
static inline void transpose_pairs(const BFloat16* rows, int64_t dim, Pair* dst) {
  const int64_t stride = pair_row_stride(dim), pairs = (dim + 1) / 2;
  for (int u = 0; u < NQ; ++u)
    for (int64_t j = 0; j < pairs; j += 16) {
      VecF r[16];
      TGA_UNROLL for (int i = 0; i < 16; ++i) __builtin_memcpy(&r[i], rows + (u * 16 + i) * stride + 2 * j, sizeof r[i]);
      transpose<float>(r);
      for (int64_t i = 0; i < 16 && j + i < pairs; ++i) __builtin_memcpy(dst + ((j + i) * NQ + u) * 16, &r[i], sizeof r[i]);
    }
}

// Scores of kMicroKeys keys: s = scale * <q, k> + table, in log2 units.
template <int NQ>
TGA_INLINE void pair_scores(VecF (&s)[kMicroKeys][NQ], const Pair* const* k, const Pair* q, int pairs, float scale,
                            const LogitTile<float>& logits, int i) {
  constexpr int W = 16, kBlock = NQ * W;
  TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] = VecF{};
  add_dot<float, Pair, NQ>(s, k + i, q, pairs);
  TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) {
    const float* t = logits.data + static_cast<int64_t>(logits.row[i + j]) * kBlock;
    TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] = fma(s[j][u], set1<float>(scale), load(t + u * W));
  }
}

template <int NQ>
struct PairForwardBlock {
  static constexpr int W = 16, kBlock = NQ * W;
  const Pair* q;                   // [(head_dim + 1) / 2][kBlock]
  ForwardBlock<float, NQ> result;  // its accumulators; q is not used
  float scale;                     // times log2(e)

  // v: one row of [value_dim] pairs for two keys.
  void add_keys(const Pair* const* k, const Pair* const* v, const LogitTile<float>& logits, int count, bool first,
                Prefetch& prefetch) const {
    alignas(64) float scores[kPairKeys * kBlock];
    for (int i = 0; i < count; i += kPairKeys) {
      for (int half = 0; half < kPairKeys; half += kMicroKeys) {
        prefetch.micro_tile(half / kMicroKeys);
        VecF s[kMicroKeys][NQ];
        pair_scores<NQ>(s, k, q, (result.head_dim + 1) / 2, scale, logits, i + half);
        TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u)
            store(scores + (half + j) * kBlock + u * W, s[j][u]);
      }
      prefetch.micro_tile(2), prefetch.micro_tile(3);
      if (first && i == 0) result.start(scores, kPairKeys);
      VecI p[kMicroKeys][NQ];
      VecF even[NQ];
      result.template softmax<kPairKeys>(scores, [&](int j, int u, VecF x) {
        if (j % 2 == 0)
          even[u] = x;
        else
          p[j / 2][u] = pair_lanes(even[u], x);
      });
      prefetch.micro_tile(4);
      add_outer<float, Pair, NQ>(result.o, p, v + i / 2, result.value_dim);
    }
  }
};

template <int NQ>
struct PairBackwardBlock {
  static constexpr int W = 16, kBlock = NQ * W;
  const Pair *q, *d_o;            // [pairs of dimensions][kBlock]
  const Pair *q_rows, *d_o_rows;  // [pair of lanes][stride]
  const float *shift, *minus_delta;
  float* d_q;      // [head_dim][kBlock], null if not wanted
  float* d_table;  // [k_len + 1][kBlock], null if not wanted
  Pair *p, *d_s;   // [kTileKeys][kBlock / 2], pairs of lanes
  int head_dim, value_dim, lanes;
  int64_t k_stride, v_stride;
  float scale;  // times log2(e)

  // k_outer: one row of [head_dim] pairs for two keys.
  void add_keys(const Pair* const* k, const Pair* const* v, const Pair* const* k_outer, const LogitTile<float>& logits,
                const int32_t* d_table_row, int count, float* d_k, float* d_v, Prefetch& prefetch) const {
    alignas(64) float ds[kPairKeys * kBlock];
    for (int i = 0; i < count; i += kPairKeys) {
      for (int half = 0, stream = 0; half < kPairKeys; half += kMicroKeys) {
        for (const int end = stream + Prefetch::kStreams / 2; stream < end; ++stream) prefetch.micro_tile(stream);
        d_scores(k, v, logits, d_table_row, i + half, ds + half * kBlock);
      }
      if (!d_q) continue;
      VecI pairs[kMicroKeys][NQ];
      TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) pairs[j][u] =
          pair_lanes(load(ds + 2 * j * kBlock + u * W), load(ds + (2 * j + 1) * kBlock + u * W));
      add_outer<float, Pair, NQ>(d_q, pairs, k_outer + i / 2, head_dim);
    }
    if (d_v) rows(value_dim, d_v, p, d_o_rows, count, v_stride);
    if (d_k) rows(head_dim, d_k, d_s, q_rows, count, k_stride);
  }

 private:
  // P and dS of kMicroKeys keys.
  inline __attribute__((always_inline)) void d_scores(const Pair* const* k, const Pair* const* v,
                                                      const LogitTile<float>& logits, const int32_t* d_table_row, int i,
                                                      float* ds) const {
    VecF s[kMicroKeys][NQ];
    pair_scores<NQ>(s, k, q, (head_dim + 1) / 2, scale, logits, i);
    TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) {
      TGA_UNROLL for (int u = 0; u < NQ; ++u) {
        s[j][u] = exp2<float, true>(s[j][u] - load(shift + u * W));
        store(ds + j * kBlock + u * W, s[j][u]);
      }
      store_lane_pairs<NQ>(p + (i + j) * (kBlock / 2), s[j]);
    }
    TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] =
        load(minus_delta + u * W);
    add_dot<float, Pair, NQ>(s, v + i, d_o, (value_dim + 1) / 2);
    TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) {
      TGA_UNROLL for (int u = 0; u < NQ; ++u) {
        s[j][u] *= load(ds + j * kBlock + u * W);
        store(ds + j * kBlock + u * W, s[j][u]);
        if (d_table) {
          float* t = d_table + static_cast<int64_t>(d_table_row[i + j]) * kBlock + u * W;
          store(t, load(t) + s[j][u]);
        }
      }
      store_lane_pairs<NQ>(d_s + (i + j) * (kBlock / 2), s[j]);
    }
  }
  void rows(int dim, float* acc, const Pair* tile, const Pair* right, int count, int64_t stride) const {
    if (interleaved<float>(dim))
      add_rows<float, Pair, 2>(acc, tile, kBlock / 2, right, count, (lanes + 3) / 4 * 2, stride);
    else
      add_rows<float, Pair, 1>(acc, tile, kBlock / 2, right, count, (lanes + 1) / 2, stride);
  }
};
#else
template <int NQ>
struct PairForwardBlock;
template <int NQ>
struct PairBackwardBlock;
#endif
