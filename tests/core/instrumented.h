// SPDX-License-Identifier: BSD-3-Clause
//
// The masked loads and stores of AVX-512, element by element. Sanitizers watch what a compiler sees as loads and stores;
// the builtins behind these intrinsics are none, so accesses of the AVX-512 kernels would go unseen. Included before those
// kernels where a sanitizer is on.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl")
#endif
namespace core_test {

template <class V, class T>
inline __attribute__((always_inline)) V load_masked(uint32_t mask, const void* p) {
  T lanes[sizeof(V) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) std::memcpy(&lanes[i], static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  V x;
  std::memcpy(&x, lanes, sizeof x);
  return x;
}

template <class T, class V>
inline __attribute__((always_inline)) void store_masked(void* p, uint32_t mask, V x) {
  T lanes[sizeof(V) / sizeof(T)];
  std::memcpy(lanes, &x, sizeof x);
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) std::memcpy(static_cast<char*>(p) + i * sizeof(T), &lanes[i], sizeof(T));
}

}  // namespace core_test
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define _mm512_maskz_loadu_ps(mask, p) core_test::load_masked<__m512, float>(mask, p)
#define _mm512_maskz_loadu_pd(mask, p) core_test::load_masked<__m512d, double>(mask, p)
#define _mm512_maskz_loadu_epi16(mask, p) core_test::load_masked<__m512i, uint16_t>(mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) core_test::load_masked<__m256i, uint16_t>(mask, p)
#define _mm256_maskz_loadu_epi8(mask, p) core_test::load_masked<__m256i, uint8_t>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, x) core_test::store_masked<float>(p, mask, x)
#define _mm512_mask_storeu_pd(p, mask, x) core_test::store_masked<double>(p, mask, x)
#define _mm512_mask_storeu_epi32(p, mask, x) core_test::store_masked<uint32_t>(p, mask, x)
#define _mm256_mask_storeu_epi16(p, mask, x) core_test::store_masked<uint16_t>(p, mask, x)
