// SPDX-License-Identifier: BSD-3-Clause
//
// Where a thread's values of a fragment lie, and where 16-byte chunks lie in shared tiles.
#pragma once

#include "device.cuh"
#include "tiles.h"

namespace torch_gated_attn::cuda {

// This thread's place in a fragment: rows `row` and `row` + 8 of a 16-row tile, columns 2 * `pair` and 2 * `pair` + 1 of
// an 8-column tile.
struct Lane {
  int index, row, pair;
};
TGA_DEVICE Lane this_lane() {
  const int lane = dev::thread_index() % 32;
  return {lane, lane / 4, lane % 4};
}

// Byte offset of 16-byte chunk `chunk` of row `row` in a shared tile. The exclusive or makes the 8 rows that one ldmatrix
// reads at one chunk fall into 8 different bank groups. The pattern repeats every 8 rows: 8 * n rows on is 8 * n *
// kRowBytes on.
template <uint32_t kRowBytes>
TGA_DEVICE uint32_t swizzled(int row, int chunk) {
  if constexpr (kRowBytes == 32) {
    return row * 32 + ((chunk ^ ((row >> 2) & 1)) << 4);
  } else if constexpr (kRowBytes == 64) {
    return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
  } else {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
}

}  // namespace torch_gated_attn::cuda
