// SPDX-License-Identifier: BSD-3-Clause
//
// Steps of the three products for NEON, which multiplies by one lane of a register: kLanes elements of a row are loaded at
// once, where a broadcast would be a load for each. A core has as many multiply-adds in a cycle as loads, or more.

// f(l) for every lane of an O, l a constant.
template <class F, size_t... L>
TGA_INLINE void for_each_lane(const F& f, std::index_sequence<L...>) {
  (f(std::integral_constant<int, static_cast<int>(L)>{}), ...);
}
template <class O, class F>
TGA_INLINE void for_each_lane(const F& f) {
  for_each_lane(f, std::make_index_sequence<kLanes<O>>{});
}

// add_dot for dimensions d to d + kLanes.
template <class A, class O, int NQ>
TGA_INLINE void add_dot_by_lane(Vec<A> (&s)[kMicroKeys][NQ], const O* const (&r)[kMicroKeys], const O* lanes, int64_t d) {
  constexpr int W = kLanes<O>;
  Vec<O> b[kMicroKeys];
  TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) b[j] = load(r[j] + d);
  for_each_lane<O>([&](auto l) __attribute__((always_inline)) {
    Vec<O> x[NQ];
    TGA_UNROLL for (int u = 0; u < NQ; ++u) x[u] = load(lanes + ((d + l.value) * NQ + u) * W);
    TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) s[j][u] =
        mul_add_lane<l.value>(x[u], b[j], s[j][u]);
  });
}

// add_outer for dimensions d to d + kLanes.
template <class A, class O, int NQ>
TGA_INLINE void add_outer_by_lane(A* acc, const Vec<O> (&p)[kMicroKeys][NQ], const O* const (&r)[kMicroKeys], int64_t d) {
  constexpr int W = kLanes<A>;
  Vec<O> b[kMicroKeys];
  TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) b[j] = load(r[j] + d);
  for_each_lane<O>([&](auto l) __attribute__((always_inline)) {
    Vec<A> x[NQ];
    A* row = acc + (d + l.value) * NQ * W;
    TGA_UNROLL for (int u = 0; u < NQ; ++u) x[u] = load(row + u * W);
    TGA_UNROLL for (int j = 0; j < kMicroKeys; ++j) TGA_UNROLL for (int u = 0; u < NQ; ++u) x[u] =
        mul_add_lane<l.value>(p[j][u], b[j], x[u]);
    TGA_UNROLL for (int u = 0; u < NQ; ++u) store(row + u * W, x[u]);
  });
}

// add_rows for lanes i to i + kLanes.
template <class A, class O, int NV, int JB>
TGA_INLINE void add_rows_by_lane(Vec<A> (&c)[JB][NV], const O* tile, int block, const O* rows, int64_t stride, int64_t i) {
  Vec<O> b[JB];
  TGA_UNROLL for (int j = 0; j < JB; ++j) b[j] = load(tile + j * block + i);
  for_each_lane<O>([&](auto l) __attribute__((always_inline)) {
    Vec<O> x[NV];
    TGA_UNROLL for (int n = 0; n < NV; ++n) x[n] = load(rows + (i + l.value) * stride + n * kLanes<A>);
    TGA_UNROLL for (int j = 0; j < JB; ++j) TGA_UNROLL for (int n = 0; n < NV; ++n) c[j][n] =
        mul_add_lane<l.value>(x[n], b[j], c[j][n]);
  });
}
