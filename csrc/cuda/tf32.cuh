// SPDX-License-Identifier: BSD-3-Clause
//
// Float32 products on tensor cores, with float32's error. A number is split into two TF32 parts, big, the nearest one, and
// small, what is left of it: together 23 of its 24 bits, mostly all. Of the four products of parts that of the small ones
// is below float32's rounding, so that three remain. Tensor cores round their sums toward zero, an error that grows with
// the number of sums: the small products have an accumulator of their own, and sums over more than 16 rows are added by
// float32 additions.
//
// mma.m16n8k8 takes a thread's columns `pair` and `pair` + 4 of A. A score fragment holds columns 2 * `pair` and
// 2 * `pair` + 1: where it is the A operand, row 2 * `pair` of the other one is taken for `pair`, and row
// 2 * `pair` + 1 for `pair` + 4, which only changes the order of a sum.
#pragma once

#include "layout.cuh"

namespace torch_gated_attn::cuda {

struct Tf32Parts {
  uint32_t big, small;
};
// By integers, since the conversion of the device takes twice as many instructions for the sake of what is infinite. A NaN
// may be lost in big, but never in small. What small loses is at most the last bit of the number.
TGA_DEVICE Tf32Parts split(uint32_t word) {
  constexpr uint32_t kBelow = 0x1fff;  // bits of a float that TF32 does not have
  const uint32_t big = (word + (kBelow + 1) / 2) & ~kBelow;
  return {big, dev::as_word(dev::as_float(word) - dev::as_float(big)) & ~kBelow};
}
TGA_DEVICE void split(const uint32_t (&words)[4], uint32_t (&big)[4], uint32_t (&small)[4]) {
  TGA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Tf32Parts parts = split(words[i]);
    big[i] = parts.big;
    small[i] = parts.small;
  }
}

// load_rows() of fragments.cuh: kSteps fragments of mma.m16n8k8, or of the big parts, then of the small ones.
template <class T>
TGA_DEVICE void load_rows_tf32(uint32_t (&fragment)[T::kFragments][4], const float* data, int64_t row_stride, int first_row,
                               int rows, int cols) {
  const Lane lane = this_lane();
  TGA_UNROLL
  for (int step = 0; step < T::kSteps; ++step) {
    uint32_t words[4];
    TGA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + lane.row + 8 * (i % 2), col = step * 8 + lane.pair + 4 * (i / 2);
      words[i] = row < rows && col < cols ? dev::load_global<uint32_t>(data + row * row_stride + col) : 0u;
    }
    if constexpr (T::kFragments == 2 * T::kSteps) {
      split(words, fragment[step], fragment[T::kSteps + step]);
    } else {
      TGA_UNROLL
      for (int i = 0; i < 4; ++i) {
        fragment[step][i] = words[i];
      }
    }
  }
}

// d = a * b over head_dim, a as load_rows_tf32 and b as load_rows_as_columns give them. kTransposed: a is what b is in the
// product that this one has to equal bit for bit.
template <class T, bool kTransposed>
TGA_DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[T::kFragments][4],
                              const uint32_t (&b)[(T::kSteps + 1) / 2][4]) {
  float cross[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  TGA_UNROLL
  for (int step = 0; step < T::kSteps; ++step) {
    const Tf32Parts b0 = split(b[step / 2][step % 2 * 2]), b1 = split(b[step / 2][step % 2 * 2 + 1]);
    uint32_t big[4], small[4];
    if constexpr (T::kFragments == 2 * T::kSteps) {
      TGA_UNROLL
      for (int i = 0; i < 4; ++i) {
        big[i] = a[step][i];
        small[i] = a[T::kSteps + step][i];
      }
    } else {
      split(a[step], big, small);
    }
    if constexpr (kTransposed) {
      dev::mma_tf32(cross, big, b0.small, b1.small, cross);
      dev::mma_tf32(cross, small, b0.big, b1.big, cross);
    } else {
      dev::mma_tf32(cross, small, b0.big, b1.big, cross);
      dev::mma_tf32(cross, big, b0.small, b1.small, cross);
    }
    dev::mma_tf32(d, big, b0.big, b1.big, d);
  }
  TGA_UNROLL
  for (int i = 0; i < 4; ++i) {
    d[i] += cross[i];
  }
}

// acc += a * tile[first_row : first_row + 16, :], the tile's rows being the k dimension; a as put_operand gives it. The 32
// words that a warp loads at once lie in 32 banks: 8 neighbouring columns of every other row.
template <class T>
TGA_DEVICE void accumulate_tf32(float (&acc)[T::kRowTiles][T::kCols][4], const uint32_t (&a)[T::kRowTiles][8],
                                uint32_t tile, int first_row) {
  const Lane lane = this_lane();
  const uint32_t column = lane.row % 4 * 4;
  const uint32_t even = tile + swizzled<T::kRowBytes>(2 * lane.pair, lane.row / 4) + column,
                 odd = tile + swizzled<T::kRowBytes>(2 * lane.pair + 1, lane.row / 4) + column;
  uint32_t big[T::kRowTiles][2][4], small[T::kRowTiles][2][4];
  TGA_UNROLL
  for (int m = 0; m < T::kRowTiles; ++m) {
    TGA_UNROLL
    for (int e = 0; e < 2; ++e) {
      const uint32_t words[4] = {a[m][4 * e], a[m][4 * e + 1], a[m][4 * e + 2], a[m][4 * e + 3]};
      split(words, big[m][e], small[m][e]);
    }
  }
  TGA_UNROLL
  for (int n = 0; n < T::kCols; ++n) {
    float sum[T::kRowTiles][4] = {};
    TGA_UNROLL
    for (int e = 0; e < 2; ++e) {
      const uint32_t rows = (first_row + 8 * e) * T::kRowBytes;
      const Tf32Parts b0 = split(dev::load_shared<uint32_t>((even ^ (n * 32)) + rows)),
                      b1 = split(dev::load_shared<uint32_t>((odd ^ (n * 32)) + rows));
      TGA_UNROLL
      for (int m = 0; m < T::kRowTiles; ++m) {
        dev::mma_tf32(sum[m], small[m][e], b0.big, b1.big, sum[m]);
        dev::mma_tf32(sum[m], big[m][e], b0.small, b1.small, sum[m]);
        dev::mma_tf32(sum[m], big[m][e], b0.big, b1.big, sum[m]);
      }
    }
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      TGA_UNROLL
      for (int i = 0; i < 4; ++i) {
        acc[m][n][i] += sum[m][i];
      }
    }
  }
}

}  // namespace torch_gated_attn::cuda
