// SPDX-License-Identifier: BSD-3-Clause
//
// The three products, register-blocked. Layouts: a transposed tile is [dimension or key][block], a lane per query; key,
// value and accumulator rows have their dimensions contiguous.

#if defined(TGA_AVX512) || defined(TGA_NEON)
constexpr int kMicroKeys = 8;  // 8 keys x 2 vectors = 16 accumulators of 32 registers
#else
constexpr int kMicroKeys = 4;  // 4 keys x 2 vectors = 8 accumulators of 16 registers
#endif

// Operands (O) are of the arithmetic type A, or pairs of bfloat16 (Pair) whose products are summed into one float: pairs of
// dimensions, keys or lanes, whichever the product sums over. Wherever it is a pair, `dim`, `lanes` and strides count
// pairs.
using Pair = int32_t;
template <>
struct VecOf<Pair> {
  using type = VecI;
};
TGA_INLINE VecF mul_add(VecF a, VecF b, VecF c) { return fma(a, b, c); }
TGA_INLINE VecD mul_add(VecD a, VecD b, VecD c) { return fma(a, b, c); }
#if defined(TGA_AVX512_BF16)
TGA_INLINE VecF mul_add(VecI a, VecI b, VecF c) {
#if defined(__clang__)
  __asm__("" : "+v"(a));  // LLVM 16 recurses without end where it sees that this is one pair in all lanes
#endif
  return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif

#if defined(TGA_NEON)
#include "micro_neon.h"
#endif

// s[j][lane] += sum_d rows[j][d] * lanes[d][lane]
template <class A, class O, int NQ>
TGA_INLINE void add_dot(Vec<A> (&s)[kMicroKeys][NQ], const O* const* rows, const O* lanes, int dim) {
  constexpr int W = kLanes<O>;
  const O* r[kMicroKeys];
  TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) r[j] = rows[j];
  int64_t d = 0;
#if defined(TGA_NEON)
  for (; d + W <= dim; d += W) add_dot_by_lane<A, O, NQ>(s, r, lanes, d);
#endif
  _Pragma("GCC unroll 4") for (; d < dim; ++d) {
    Vec<O> x[NQ];
    TGA_UNROLL for (int u = 0; u < NQ; ++u) x[u] = load(lanes + (d * NQ + u) * W);
    TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) {
      const Vec<O> b = set1<O>(r[j][d]);
      TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] = mul_add(b, x[u], s[j][u]);
    }
  }
}

// acc[d][lane] += sum_j rows[j][d] * p[j][lane]. DU dimensions at once give DU * NQ independent chains.
template <class A, class O, int NQ, int DU>
TGA_INLINE void add_outer_step(A* acc, const Vec<O> (&p)[kMicroKeys][NQ], const O* const (&r)[kMicroKeys], int64_t d) {
  constexpr int W = kLanes<A>;
  Vec<A> x[DU][NQ];
  TGA_UNROLL for (int e = 0; e < DU; ++e) TGA_UNROLL for (int u = 0; u < NQ; ++u) x[e][u] =
      load(acc + ((d + e) * NQ + u) * W);
  TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int e = 0; e < DU; ++e) {
    const Vec<O> b = set1<O>(r[j][d + e]);
    TGA_UNROLL for (int u = 0; u < NQ; ++u) x[e][u] = mul_add(b, p[j][u], x[e][u]);
  }
  TGA_UNROLL for (int e = 0; e < DU; ++e) TGA_UNROLL for (int u = 0; u < NQ; ++u)
      store(acc + ((d + e) * NQ + u) * W, x[e][u]);
}
template <class A, class O, int NQ>
TGA_INLINE void add_outer(A* acc, const Vec<O> (&p)[kMicroKeys][NQ], const O* const* rows, int dim) {
  const O* r[kMicroKeys];
  TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) r[j] = rows[j];
  int64_t d = 0;
#if defined(TGA_NEON)
  for (; d + kLanes<O> <= dim; d += kLanes<O>) add_outer_by_lane<A, O, NQ>(acc, p, r, d);
#endif
  for (; d + 2 <= dim; d += 2) add_outer_step<A, O, NQ, 2>(acc, p, r, d);
  if (d < dim) add_outer_step<A, O, NQ, 1>(acc, p, r, d);
}

// Row-major products, for the gradients of key and value: acc[j][:] += sum_lane tile[j][lane] * rows[lane][:].
//
// With INTERLEAVE = 2 a vector holds half as many dimensions of two neighbouring lanes, alternating, so that a small
// head_dim fills it; the pairs of the accumulator are added at the end.
template <class O, int INTERLEAVE>
TGA_INLINE Vec<O> broadcast_lanes(const O* p) {
  if constexpr (INTERLEAVE == 1) {
    return set1<O>(*p);
  } else {
    double both;
    __builtin_memcpy(&both, p, sizeof both);
    return (Vec<O>)set1<double>(both);
  }
}
template <class A, class O, int INTERLEAVE, int NV, int JB>
TGA_INLINE void add_rows_step(A* acc, const O* tile, int block, const O* rows, int lanes, int64_t stride) {
  constexpr int W = kLanes<A>;
  Vec<A> c[JB][NV];
  TGA_UNROLL for (int j = 0; j < JB; ++j) TGA_UNROLL for (int n = 0; n < NV; ++n) c[j][n] = load(acc + j * stride + n * W);
  int64_t i = 0;
#if defined(TGA_NEON)
  for (; i + kLanes<O> <= lanes; i += kLanes<O>) add_rows_by_lane<A, O, NV, JB>(c, tile, block, rows, stride, i);
#endif
  _Pragma("GCC unroll 2") for (; i < lanes; i += INTERLEAVE) {
    Vec<O> x[NV];
    TGA_UNROLL for (int n = 0; n < NV; ++n) x[n] = load(rows + i / INTERLEAVE * stride + n * W);
    TGA_UNROLL for (int j = 0; j < JB; ++j) {
      const Vec<O> b = broadcast_lanes<O, INTERLEAVE>(tile + j * block + i);
      TGA_UNROLL for (int n = 0; n < NV; ++n) c[j][n] = mul_add(b, x[n], c[j][n]);
    }
  }
  TGA_UNROLL for (int j = 0; j < JB; ++j) TGA_UNROLL for (int n = 0; n < NV; ++n) store(acc + j * stride + n * W, c[j][n]);
}

// One strip of NV vectors for all `count` keys (a multiple of kMicroKeys).
template <class A, class O, int INTERLEAVE, int NV>
TGA_INLINE void add_rows_strip(A* acc, const O* tile, int block, const O* rows, int count, int lanes, int64_t stride) {
#if defined(TGA_AVX512)
  constexpr int JB = NV == 1 ? 16 : NV <= 3 ? 8 : 4;  // 16 to 24 accumulators
#elif defined(TGA_NEON)
  constexpr int JB = NV <= 2 ? 8 : 4;  // 8 to 16 accumulators, and as many registers for the lanes of the tile as JB
#else
  constexpr int JB = NV == 1 ? 8 : 4;  // 8 to 12 accumulators
#endif
  int j = 0;
  for (; j + JB <= count; j += JB)
    add_rows_step<A, O, INTERLEAVE, NV, JB>(acc + j * stride, tile + j * block, block, rows, lanes, stride);
  if constexpr (JB > kMicroKeys)
    if (j < count)
      add_rows_step<A, O, INTERLEAVE, NV, kMicroKeys>(acc + j * stride, tile + j * block, block, rows, lanes, stride);
}
template <class A, class O, int INTERLEAVE>
static inline void add_rows(A* acc, const O* tile, int block, const O* rows, int count, int lanes, int64_t stride) {
  constexpr int W = kLanes<A>;
#if defined(TGA_AVX512)
  constexpr int kWide = 4;  // vectors of the widest strip
#else
  constexpr int kWide = 2;
#endif
  int64_t n = 0, left = stride / W;
  while (left > 0) {
    const auto strip = [&](auto vectors) {
      add_rows_strip<A, O, INTERLEAVE, vectors.value>(acc + n * W, tile, block, rows + n * W, count, lanes, stride);
      n += vectors.value;
      left -= vectors.value;
    };
    if (left == 1)
      strip(std::integral_constant<int, 1>{});
    else if (left == 3 || left == 5)  // 5 = 3 + 2: no strip of one vector
      strip(std::integral_constant<int, 3>{});
    else if (left < kWide)
      strip(std::integral_constant<int, 2>{});
    else
      strip(std::integral_constant<int, kWide>{});
  }
}

// Two rows as one, element by element in turn, and what add_rows makes of such rows: one row of the sums of neighbours.
// `room` elements are in memory, one vector or more.
template <class V, int FIRST, size_t... L>
TGA_INLINE V alternate(V a, V b, std::index_sequence<L...>) {
  constexpr int n = sizeof...(L);
  return __builtin_shufflevector(a, b, (FIRST + L / 2 + (L % 2) * n)...);
}
template <class A>
TGA_INLINE void store_alternating(Vec<A> a, Vec<A> b, A* dst, int64_t room) {
  constexpr int W = kLanes<A>;
  store(dst, alternate<Vec<A>, 0>(a, b, std::make_index_sequence<W>{}));
  if (room > W) store(dst + W, alternate<Vec<A>, W / 2>(a, b, std::make_index_sequence<W>{}));
}
template <class V, size_t... L>
TGA_INLINE V pair_sums(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (2 * L)...) + __builtin_shufflevector(a, b, (2 * L + 1)...);
}
template <class A>
TGA_INLINE Vec<A> load_pair_sums(const A* p, int64_t room) {
  constexpr int W = kLanes<A>;
  return pair_sums(load(p), room > W ? load(p + W) : Vec<A>{}, std::make_index_sequence<W>{});
}

// Whether rows of `dim` elements are interleaved: where a vector of 16 floats would be half empty.
template <class A>
constexpr bool kInterleaves = kLanes<A> == 16;
template <class A>
TGA_INLINE bool interleaved(int64_t dim) {
  return kInterleaves<A> && (dim + 7) / 8 % 2 == 1 && dim <= 24;
}
// Elements of a row of the row-major operands and accumulators.
template <class A>
TGA_INLINE int64_t row_stride(int64_t dim) {
  if (interleaved<A>(dim)) return (dim + 7) / 8 * 16;
  return (dim + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}
