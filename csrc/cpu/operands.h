// SPDX-License-Identifier: BSD-3-Clause
//
// What the products of a call read: operands of the arithmetic type, or pairs of bfloat16 (pairs.h).

template <class T>
struct OperandOf {
  static constexpr bool kPairs = false;
};
#if defined(TGA_AVX512_BF16)
template <>
struct OperandOf<BFloat16> {
  static constexpr bool kPairs = true;
};
#endif
template <class T>
constexpr bool kPairs = OperandOf<T>::kPairs;
template <class T, class A>
using Operand = std::conditional_t<kPairs<T>, Pair, A>;

// Operands along `dim` dimensions (or lanes).
template <class T>
TGA_INLINE int64_t operands(int64_t dim) {
  return kPairs<T> ? (dim + 1) / 2 : dim;
}
// Keys of a micro-tile.
template <class T>
constexpr int kKeyGroup = kPairs<T> ? 2 * kMicroKeys : kMicroKeys;
