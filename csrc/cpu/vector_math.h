// SPDX-License-Identifier: BSD-3-Clause
//
// exp2, log2 and sigmoid on vectors. Logits are kept in units of log2 throughout: one multiplication less per score.

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <class A>
constexpr A kInf = __builtin_inff();
template <class A>
constexpr A kLowest = sizeof(A) == 4 ? -3.40282346638528859812e38 : -1.79769313486231570815e308;

// 2^x on [0, 1), minimax, relative error 7e-8, 2^0 = 1 exactly.
constexpr double kExp2OfFraction[] = {1.8689563368e-3, 9.0148845707e-3, 5.5799300728e-2,
                                      2.4016565110e-1, 6.9315106752e-1, 1.0};

// Without AVX-512: adding 1.5 * 2^mantissa_bits rounds to an integer that then stands in the low bits of the mantissa; with
// the exponent bias added too, shifting those bits up gives 2^n.
template <class A>
constexpr A kRoundMagic = sizeof(A) == 4 ? 12582912.0 + 127 : 6755399441055744.0 + 1023;
template <class A>
constexpr int kMantissaBits = sizeof(A) == 4 ? 23 : 52;
template <class A>
constexpr A kSmallestExponent = sizeof(A) == 4 ? -127 : -1023;  // of zero, as the bits say it
template <class A>
constexpr A kLargestExponent = sizeof(A) == 4 ? 128 : 1024;  // of infinity

template <class A>
TGA_INLINE Vec<A> horner(Vec<A> x, const double* coefficients, int count) {
  Vec<A> y = set1<A>(static_cast<A>(coefficients[0]));
  TGA_UNROLL for (int i = 1; i < count; ++i) y = fma(y, x, set1<A>(static_cast<A>(coefficients[i])));
  return y;
}

// 2^x. Exactly 0 below 2^-126 (float) or 2^-1022 (double), also for -inf: an excluded key leaves no trace. Infinite from
// 128 (1024). NaN stays NaN.
//
// With FLUSHING the caller holds a FlushToZero, which keeps denormal results away: they cost vscalefps some 200 cycles.
// Without, a mask does.
template <class A, bool FLUSHING = false>
TGA_INLINE Vec<A> exp2(Vec<A> x) {
#if defined(TGA_AVX512)
  if constexpr (sizeof(A) == 4) {
    // Seven operations, or eight, instead of twelve.
    const __m512 fraction = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // 0 for infinities
    const __m512 power = (__m512)horner<A>((VecF)fraction, kExp2OfFraction, 6);
    if constexpr (FLUSHING) return (VecF)_mm512_scalef_ps(power, (__m512)x);
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    return (VecF)_mm512_maskz_scalef_ps(normal, power, (__m512)x);
  }
#endif
  // float: minimax on [-1/2, 1/2], relative error 1.1e-7, 2^0 = 1 exactly. double: Taylor, ln2^n / n!, 4e-18.
  constexpr double kFloat[] = {1.3264727140e-3, 9.6715126400e-3, 5.5507337435e-2, 2.4022242085e-1, 6.9314697760e-1, 1.0};
  constexpr double kDouble[] = {1.3691488853904124e-12, 2.5678435993488196e-11,
                                4.44553827187081e-10,   7.054911620801121e-09,
                                1.0178086009239696e-07, 1.3215486790144305e-06,
                                1.5252733804059838e-05, 0.00015403530393381606,
                                0.0013333558146428441,  0.009618129107628477,
                                0.055504108664821576,   0.2402265069591007,
                                0.6931471805599453,     1.0};
  x = clamp(x, set1<A>(kSmallestExponent<A>), set1<A>(kLargestExponent<A>));
  const Vec<A> rounded = x + set1<A>(kRoundMagic<A>);
  const Vec<A> fraction = x - (rounded - set1<A>(kRoundMagic<A>));
  const Vec<A> power = (Vec<A>)((VecBits<A>)rounded << kMantissaBits<A>);
  if constexpr (sizeof(A) == 4) return horner<A>(fraction, kFloat, 6) * power;
  return horner<A>(fraction, kDouble, 14) * power;
}

// log2(x) for positive normal x: x = 2^e * m with m in [sqrt(1/2), sqrt(2)), log(m) = 2 atanh((m - 1) / (m + 1)).
template <class A>
TGA_INLINE Vec<A> log2(Vec<A> x) {
  if constexpr (sizeof(A) == 8) {
    for (int i = 0; i < kLanes<A>; ++i) x[i] = __builtin_log2(x[i]);
    return x;
  } else {
    const VecI bits = (VecI)x;
    const VecI exponent = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
    const Vec<A> m = (Vec<A>)(bits - (exponent << 23));
    const Vec<A> t = (m - set1<A>(1)) / (m + set1<A>(1));
    constexpr double kAtanh[] = {2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0};
    return fma(horner<A>(t * t, kAtanh, 5) * t, set1<A>(static_cast<A>(kLog2E)), __builtin_convertvector(exponent, VecF));
  }
}

// 1 / x for x in [1, 2]. A 512-bit division takes 16 cycles and more; the estimate is good to 14 bits, a Newton step to
// all.
template <class A>
TGA_INLINE Vec<A> reciprocal(Vec<A> x) {
#if defined(TGA_AVX512)
  if constexpr (sizeof(A) == 4) {
    const VecF estimate = (VecF)_mm512_rcp14_ps((__m512)x);
    return fma(fma(-x, estimate, set1<A>(1)), estimate, estimate);
  }
#endif
  return set1<A>(1) / x;
}

// sigmoid(x) and 1 - sigmoid(x), both without cancellation; exactly 0 and 1 at -inf and +inf.
template <class A>
struct Sigmoid {
  Vec<A> value, complement;
};
template <class A>
TGA_INLINE Sigmoid<A> sigmoid(Vec<A> x) {
  const Vec<A> one = set1<A>(1), negative = (Vec<A>)((VecBits<A>)x | (VecBits<A>)-Vec<A>{});
  const Vec<A> e = exp2<A>(negative * set1<A>(static_cast<A>(kLog2E)));
  const Vec<A> large = reciprocal<A>(one + e), small = e * large;
  const VecBits<A> below = x < Vec<A>{};
  return {below ? small : large, below ? large : small};
}

// A logit in log2 units. A finite one stays finite: finfo.min is a logit like any other. Infinities and NaN pass.
template <class A>
TGA_INLINE Vec<A> log2_logit(Vec<A> x) {
  const Vec<A> low = set1<A>(kLowest<A>);
  const Vec<A> clamped = max(low, min(-low, x * set1<A>(static_cast<A>(kLog2E))));
  return x - x == Vec<A>{} ? clamped : x;
}
