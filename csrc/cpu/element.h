// SPDX-License-Identifier: BSD-3-Clause
//
// Elements in memory (float, double, bfloat16, float16) to and from vectors of the arithmetic type A. `n` counts the
// elements that exist: nothing beyond them is read (the lanes are 0) or written.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint16_t VecHalf __attribute__((vector_size(kVectorBytes / 2)));  // the 16-bit elements of one VecF

TGA_INLINE VecF widen(VecHalf h, BFloat16) { return (VecF)(__builtin_convertvector(h, VecI) << 16); }

// Round to nearest even on the integer image. A NaN gets its quiet bit, so that the carry cannot make it an infinity.
TGA_INLINE VecHalf narrow(VecF x, BFloat16) {
  const VecI bits = (VecI)x;
  const VecI rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, VecHalf);
}

#if defined(TGA_AVX512)
TGA_INLINE VecF widen(VecHalf h, Float16) { return (VecF)_mm512_cvtph_ps((__m256i)h); }
TGA_INLINE VecHalf narrow(VecF x, Float16) { return (VecHalf)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(TGA_AVX2)
TGA_INLINE VecF widen(VecHalf h, Float16) { return (VecF)_mm256_cvtph_ps((__m128i)h); }
TGA_INLINE VecHalf narrow(VecF x, Float16) { return (VecHalf)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(TGA_NEON)
TGA_INLINE VecF widen(VecHalf h, Float16) { return (VecF)vcvt_f32_f16((float16x4_t)h); }
TGA_INLINE VecHalf narrow(VecF x, Float16) { return (VecHalf)vcvt_f16_f32((float32x4_t)x); }
#else
// float16 has 10 mantissa bits and exponent bias 15; moving its bits to float's places leaves the value times 2^-112.
TGA_INLINE VecF widen(VecHalf h, Float16) {
  const VecI wide = __builtin_convertvector(h, VecI), magnitude = (wide & 0x7fff) << 13;
  const VecI finite = (VecI)((VecF)magnitude * 0x1p112f);
  const VecI bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return (VecF)(bits | (wide & 0x8000) << 16);
}
TGA_INLINE VecHalf narrow(VecF x, Float16) {
  const VecI bits = (VecI)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Subnormal results: adding 0.5 (whose last bit is 2^-24) rounds to float16's smallest step.
  const VecI small = (VecI)((VecF)magnitude + 0.5f) - 0x3f000000;
  const VecI normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const VecI special = magnitude > 0x7f800000 ? (VecI{} + 0x7e00) : (VecI{} + 0x7c00);
  // 0x38800000 = 2^-14, the smallest normal; 0x477ff000 = 65520, which rounds to infinity.
  const VecI finite = magnitude < 0x38800000 ? small : normal;
  return __builtin_convertvector((magnitude >= 0x477ff000 ? special : finite) | sign, VecHalf);
}
#endif

#if defined(TGA_AVX512)
TGA_INLINE uint32_t lane_mask(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }
TGA_INLINE VecF load_n(const float* p, int n) { return (VecF)_mm512_maskz_loadu_ps(lane_mask(n), p); }
TGA_INLINE VecD load_n(const double* p, int n) { return (VecD)_mm512_maskz_loadu_pd(lane_mask(n), p); }
TGA_INLINE void store_n(float* p, VecF x, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), (__m512)x); }
TGA_INLINE void store_n(double* p, VecD x, int n) { _mm512_mask_storeu_pd(p, lane_mask(n), (__m512d)x); }
template <class T>
TGA_INLINE VecF load_n(const T* p, int n) {
  return widen((VecHalf)_mm256_maskz_loadu_epi16(lane_mask(n), p), T{});
}
template <class T>
TGA_INLINE void store_n(T* p, VecF x, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), (__m256i)narrow(x, T{}));
}
#else
template <class V, class T>
TGA_INLINE V load_bits(const T* p, int n) {
  V x{};
  if (n * sizeof(T) >= sizeof x)
    __builtin_memcpy(&x, p, sizeof x);
  else
    __builtin_memcpy(&x, p, n * sizeof(T));
  return x;
}
template <class V, class T>
TGA_INLINE void store_bits(T* p, V x, int n) {
  if (n * sizeof(T) >= sizeof x)
    __builtin_memcpy(p, &x, sizeof x);
  else
    __builtin_memcpy(p, &x, n * sizeof(T));
}
TGA_INLINE VecF load_n(const float* p, int n) { return load_bits<VecF>(p, n); }
TGA_INLINE VecD load_n(const double* p, int n) { return load_bits<VecD>(p, n); }
TGA_INLINE void store_n(float* p, VecF x, int n) { store_bits(p, x, n); }
TGA_INLINE void store_n(double* p, VecD x, int n) { store_bits(p, x, n); }
template <class T>
TGA_INLINE VecF load_n(const T* p, int n) {
  return widen(load_bits<VecHalf>(p, n), T{});
}
template <class T>
TGA_INLINE void store_n(T* p, VecF x, int n) {
  store_bits(p, narrow(x, T{}), n);
}
#endif

// One element as the arithmetic type: for headwise gates, strided gradients and other places off the hot path.
template <class T>
TGA_INLINE auto load_one(const T* p) {
  return load_n(p, 1)[0];
}
// The positions below `count` where the byte is not 0, in order; their number. Writes up to a vector beyond them.
TGA_INLINE int indices_of_set(const uint8_t* bytes, int64_t stride, int64_t count, int32_t* out) {
  int n = 0;
  int32_t i = 0;
#if defined(TGA_AVX512)
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; stride == 1 && i + 16 <= count; i += 16) {
    const __mmask16 set = _mm_test_epi8_mask(_mm_loadu_si128((const __m128i*)(bytes + i)), _mm_set1_epi8(-1));
    _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi32(set, _mm512_add_epi32(first, _mm512_set1_epi32(i))));
    n += __builtin_popcount(set);
  }
#endif
  for (; i < count; ++i) {
    out[n] = i;
    n += bytes[i * stride] != 0;
  }
  return n;
}

// Mask bytes as 0 or 1.
template <class A>
TGA_INLINE Vec<A> load_mask(const uint8_t* p, int n) {
  Vec<A> x{};
  for (int i = 0; i < n; ++i) x[i] = p[i] != 0;
  return x;
}
