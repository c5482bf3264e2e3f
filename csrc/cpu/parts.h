// SPDX-License-Identifier: BSD-3-Clause
//
// The second step of a backward whose queries were shared out: the parts of a key or value gradient, summed in their order.

// Row `row` of every part, [k_len][dim], `stride` bytes apart, into dst. Null dst: the gradient is not wanted.
template <class A, class T>
static inline void sum_parts(const char* part, int64_t row, int64_t parts, int64_t stride, int64_t k_len, int64_t dim,
                             T* dst, const View& v) {
  if (!dst) return;
  for (int64_t key = 0; key < k_len; ++key)
    for (int64_t d = 0; d < dim; d += kLanes<A>) {
      const int n = static_cast<int>(dim - d < kLanes<A> ? dim - d : kLanes<A>);
      const int64_t element = (row * k_len + key) * dim + d;
      Vec<A> sum{};
      for (int64_t i = 0; i < parts; ++i) sum += load_n(reinterpret_cast<const A*>(part + i * stride) + element, n);
      store_n(dst + key * v.row + d, sum, n);
    }
}
