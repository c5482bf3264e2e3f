// SPDX-License-Identifier: BSD-3-Clause
//
// Rows in chunks of eight 16-bit values: 16 bytes to an access where a row is aligned to that, pairs or single values
// elsewhere.
#pragma once

#include "fragments.cuh"

namespace torch_gated_attn::cuda {

TGA_DEVICE bool aligned_to_chunks(const uint16_t* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// Columns `col` to `col` + 7 of a row of `cols` values, zeros past the end. kWhole: `cols` is a multiple of 8, and rows are
// aligned to pairs.
template <bool kWhole>
TGA_DEVICE Word4 load_chunk(const uint16_t* row, int col, int cols, bool pairs_aligned) {
  const uint16_t* const at = row + col;
  if (kWhole && col >= cols) {
    return {};
  }
  if ((kWhole || col + 8 <= cols) && aligned_to_chunks(at)) {
    return dev::load_global<Word4>(at);
  }
  const auto pair = [&](int i) {
    return kWhole ? dev::load_global<uint32_t>(at + i) : load_pair(row, col + i, cols, pairs_aligned);
  };
  return {pair(0), pair(2), pair(4), pair(6)};
}

template <bool kWhole>
TGA_DEVICE void store_chunk(uint16_t* row, int col, int cols, bool pairs_aligned, const Word4& words) {
  uint16_t* const at = row + col;
  if (kWhole && col >= cols) {
    return;
  }
  if ((kWhole || col + 8 <= cols) && aligned_to_chunks(at)) {
    return dev::store_global(at, words);
  }
  const auto store = [&](int i, uint32_t word) {
    if constexpr (kWhole) {
      dev::store_global(at + i, word);
    } else {
      store_word(row, col + i, cols, pairs_aligned, word);
    }
  };
  store(0, words.x);
  store(2, words.y);
  store(4, words.z);
  store(6, words.w);
}

template <DType kType>
TGA_DEVICE void unpack_chunk(float (&x)[8], const Word4& words) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
  TGA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Float2 pair = dev::unpack<kType>(w[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}
template <DType kType>
TGA_DEVICE Word4 pack_chunk(const float (&x)[8]) {
  return {dev::pack<kType>(x[0], x[1]), dev::pack<kType>(x[2], x[3]), dev::pack<kType>(x[4], x[5]),
          dev::pack<kType>(x[6], x[7])};
}

// Turns accumulators, of which a thread holds two columns of every eight, into chunks of rows, through shared memory that
// belongs to the warp. A tile has 16 rows of kCols chunks, kCols / 2 of them a lane's.
template <int kCols>
class RowExchange {
  // Eight words of padding: the 16 lanes that store 8 bytes at once hold four rows, which then begin in different banks.
  static constexpr int kRowWords = kCols * 8 + 8;

 public:
  static constexpr uint32_t kWarpBytes = 16 * kRowWords * 4;
  static constexpr int kPerLane = kCols / 2;

  // `shared` is the block's, kWarpBytes to a warp.
  TGA_DEVICE explicit RowExchange(uint32_t shared) : shared_(shared + dev::thread_index() / 32 * kWarpBytes) {}

  // Columns n * 8 + 2 * pair and the next of row lane.row + 8 * i.
  TGA_DEVICE void put(int i, int n, float x, float y) const {
    const Lane lane = this_lane();
    dev::store_shared(shared_ + ((lane.row + 8 * i) * kRowWords + n * 8 + lane.pair * 2) * 4, Float2{x, y});
  }
  // Between put() and get() of a tile, and before the next.
  TGA_DEVICE void sync() const { dev::sync_warp(); }

  // Row of the tile and first column of this lane's chunk j.
  static TGA_DEVICE int row(int j) { return (dev::thread_index() % 32 + 32 * j) / kCols; }
  static TGA_DEVICE int col(int j) { return (dev::thread_index() % 32 + 32 * j) % kCols * 8; }
  TGA_DEVICE void get(int j, float (&x)[8]) const {
    TGA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Float4 v = dev::load_shared<Float4>(shared_ + (row(j) * kRowWords + col(j) + half * 4) * 4);
      x[half * 4] = v.x;
      x[half * 4 + 1] = v.y;
      x[half * 4 + 2] = v.z;
      x[half * 4 + 3] = v.w;
    }
  }

 private:
  uint32_t shared_;
};

}  // namespace torch_gated_attn::cuda
