// SPDX-License-Identifier: BSD-3-Clause
//
// Vector registers of float and double for one instruction set. Included inside the namespace of that set, after its
// TGA_TARGET_BEGIN; the including file defines TGA_AVX512, TGA_AVX2 or TGA_NEON, or none for the portable path (GCC vector
// extensions: SSE2 on x86, NEON on aarch64). Everything is always_inline, so no code of a newer instruction set can be
// picked by the linker for an older machine.

#define TGA_INLINE static inline __attribute__((always_inline))
#define TGA_UNROLL _Pragma("GCC unroll 16")

#if defined(TGA_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(TGA_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// may_alias: scratch memory is read as other element types too; aligned(1 element): every load is an unaligned one.
typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecL __attribute__((vector_size(kVectorBytes)));

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF;
  using Bits = VecI;
};
template <>
struct VecOf<double> {
  using type = VecD;
  using Bits = VecL;
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
using VecBits = typename VecOf<A>::Bits;

template <class A>
TGA_INLINE Vec<A> load(const A* p) {
  Vec<A> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class A>
TGA_INLINE void store(A* p, Vec<A> x) {
  __builtin_memcpy(p, &x, sizeof x);
}
template <class A>
TGA_INLINE Vec<A> set1(A x) {
  return x - Vec<A>{};
}

#if defined(TGA_AVX512)
TGA_INLINE VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
TGA_INLINE VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
// As the instruction has it: b where either is NaN.
TGA_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
TGA_INLINE VecD max(VecD a, VecD b) { return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b); }
TGA_INLINE VecD min(VecD a, VecD b) { return (VecD)_mm512_min_pd((__m512d)a, (__m512d)b); }
TGA_INLINE VecF min(VecF a, VecF b) { return (VecF)_mm512_min_ps((__m512)a, (__m512)b); }
TGA_INLINE bool any_greater(VecF a, VecF b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0; }
TGA_INLINE bool any_greater(VecD a, VecD b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0; }
TGA_INLINE float sum_lanes(VecF a) { return _mm512_reduce_add_ps((__m512)a); }
TGA_INLINE float max_lane(VecF a) { return _mm512_reduce_max_ps((__m512)a); }
TGA_INLINE double max_lane(VecD a) { return _mm512_reduce_max_pd((__m512d)a); }
TGA_INLINE double sum_lanes(VecD a) { return _mm512_reduce_add_pd((__m512d)a); }
#elif defined(TGA_AVX2)
TGA_INLINE VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
TGA_INLINE VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
TGA_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
TGA_INLINE VecD max(VecD a, VecD b) { return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b); }
TGA_INLINE VecF min(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }
TGA_INLINE VecD min(VecD a, VecD b) { return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b); }
TGA_INLINE bool any_greater(VecF a, VecF b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
}
TGA_INLINE bool any_greater(VecD a, VecD b) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)) != 0;
}
#else
#if defined(TGA_NEON)
TGA_INLINE VecF fma(VecF a, VecF b, VecF c) { return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
TGA_INLINE VecD fma(VecD a, VecD b, VecD c) { return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
// a times lane L of b, plus c: no instruction and no register for a broadcast.
template <int L>
TGA_INLINE VecF mul_add_lane(VecF a, VecF b, VecF c) {
  return (VecF)vfmaq_laneq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b, L);
}
template <int L>
TGA_INLINE VecD mul_add_lane(VecD a, VecD b, VecD c) {
  return (VecD)vfmaq_laneq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b, L);
}
#else
template <class V>
TGA_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif
template <class V>
TGA_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
TGA_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
TGA_INLINE bool any_greater(V a, V b) {
  const auto greater = a > b;
  bool any = false;
  for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) any |= greater[i] != 0;
  return any;
}
#endif
#if !defined(TGA_AVX512)
// Halves are added pairwise, so the order of the sum does not depend on the compiler.
template <class V>
TGA_INLINE auto sum_lanes(V a) {
  constexpr int n = sizeof(V) / sizeof(a[0]);
  for (int step = n / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a[i] += a[i + step];
  return a[0];
}
#endif

#if !defined(TGA_AVX512)
template <class V>
TGA_INLINE auto max_lane(V a) {
  constexpr int n = sizeof(V) / sizeof(a[0]);
  for (int step = n / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a[i] = a[i] < a[i + step] ? a[i + step] : a[i];
  return a[0];
}
#endif

// x within [low, high]; NaN stays NaN.
template <class V>
TGA_INLINE V clamp(V x, V low, V high) {
#if defined(TGA_NEON)  // whose own maximum and minimum keep NaN; max and min above are two instructions each
  if constexpr (sizeof(x[0]) == 4)
    return (V)vmaxq_f32((float32x4_t)low, vminq_f32((float32x4_t)high, (float32x4_t)x));
  else
    return (V)vmaxq_f64((float64x2_t)low, vminq_f64((float64x2_t)high, (float64x2_t)x));
#else
  return max(low, min(high, x));  // this order keeps NaN
#endif
}

// While it lives, results below the smallest normal number are 0 on this thread.
class FlushToZero {
#if defined(TGA_AVX512)
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#elif defined(TGA_NEON)
 public:
  FlushToZero() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    write(before_ | kFlushToZero);
  }
  ~FlushToZero() { write(before_); }

 private:
  static constexpr uint64_t kFlushToZero = 1 << 24;  // operands below the smallest normal number are 0, too
  static void write(uint64_t fpcr) { __asm__ volatile("msr fpcr, %0" : : "r"(fpcr)); }
  uint64_t before_;
#else
 public:
  FlushToZero() {}  // a constructor, so that an unused object is no warning
#endif
};

template <class V, size_t... L>
TGA_INLINE V join(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (L < sizeof...(L) / 2 ? L : L + sizeof...(L) / 2)...);
}
// The lower halves of two vectors, and the upper half of one in the place of its lower.
template <class V>
TGA_INLINE V lower_halves(V a, V b) {
  return join(a, b, std::make_index_sequence<sizeof(V) / sizeof(a[0])>{});
}
template <class V, size_t... L>
TGA_INLINE V rotate_half(V a, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, a, (L + sizeof...(L) / 2)...);
}
template <class V>
TGA_INLINE V upper_half(V a) {
  return rotate_half(a, std::make_index_sequence<sizeof(V) / sizeof(a[0])>{});
}

// Transposes kLanes registers in place: in stage S, 2x2 blocks of S lanes swap their off-diagonal halves.
template <int S, class V, size_t... L>
TGA_INLINE void swap_blocks(V& a, V& b, std::index_sequence<L...>) {
  constexpr int n = sizeof...(L);
  const V lo = __builtin_shufflevector(a, b, ((L & S) ? n + L - S : L)...);
  const V hi = __builtin_shufflevector(a, b, ((L & S) ? n + L : L + S)...);
  a = lo;
  b = hi;
}
template <class A, int S = kLanes<A> / 2, int N = kLanes<A>>
TGA_INLINE void transpose(Vec<A> (&rows)[N]) {
  if constexpr (S > 0) {
    TGA_UNROLL for (int i = 0; i < N; ++i) {
      if ((i & S) == 0) swap_blocks<S>(rows[i], rows[i + S], std::make_index_sequence<kLanes<A>>{});
    }
    transpose<A, S / 2>(rows);
  }
}
// The halves of kLanes / 2 registers, each by itself: a third of the shuffles, for rows no longer than that. Register i
// then has column i of the lower halves below column i of the upper ones.
template <class A>
TGA_INLINE void transpose_halves(Vec<A> (&rows)[kLanes<A> / 2]) {
  transpose<A, kLanes<A> / 4>(rows);
}

// The sum of the lanes of each of kLanes registers, that of register i in lane i; halves are added as in sum_lanes.
template <class A, int S = kLanes<A> / 2, int N = kLanes<A>>
TGA_INLINE Vec<A> sums_of_lanes(Vec<A> (&x)[N]) {
  if constexpr (S > 0) {
    TGA_UNROLL for (int i = 0; i < S; ++i) {
      swap_blocks<S>(x[i], x[i + S], std::make_index_sequence<kLanes<A>>{});
      x[i] += x[i + S];
    }
    return sums_of_lanes<A, S / 2>(x);
  } else {
    return x[0];
  }
}
