// SPDX-License-Identifier: BSD-3-Clause
//
// Rows in chunks of eight values: 16 bytes to an access where a row is aligned to that, pairs or single values elsewhere.
#pragma once

#include "fragments.cuh"

namespace torch_gated_attn::cuda {

// Eight values as they lie in memory, by 16 bytes: eight of 16 bits, or twice four of float32.
template <DType kType>
struct Chunk {
  static constexpr int kValues = 16 / sizeof(ElementOf<kType>);  // of a part
  static constexpr int kParts = 8 / kValues;
  Word4 parts[kParts];
};

TGA_DEVICE bool aligned_to_16_bytes(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// The part of a chunk that begins at `col`. kWhole: `cols` is a multiple of its length, and rows are aligned to pairs.
template <DType kType, bool kWhole>
TGA_DEVICE Word4 load_part(const ElementOf<kType>* row, int col, int cols, bool pairs_aligned) {
  const ElementOf<kType>* const at = row + col;
  if (kWhole && col >= cols) {
    return {};
  }
  if ((kWhole || col + Chunk<kType>::kValues <= cols) && aligned_to_16_bytes(at)) {
    return dev::load_global<Word4>(at);
  }
  const auto word = [&](int i) -> uint32_t {
    if constexpr (kType == DType::kFloat32) {
      return kWhole || col + i < cols ? dev::load_global<uint32_t>(at + i) : 0u;
    } else {
      return kWhole ? dev::load_global<uint32_t>(at + 2 * i) : load_pair(row, col + 2 * i, cols, pairs_aligned);
    }
  };
  return {word(0), word(1), word(2), word(3)};
}

template <DType kType, bool kWhole>
TGA_DEVICE void store_part(ElementOf<kType>* row, int col, int cols, bool pairs_aligned, const Word4& words) {
  ElementOf<kType>* const at = row + col;
  if (kWhole && col >= cols) {
    return;
  }
  if ((kWhole || col + Chunk<kType>::kValues <= cols) && aligned_to_16_bytes(at)) {
    return dev::store_global(at, words);
  }
  const auto store = [&](int i, uint32_t word) {
    if constexpr (kType == DType::kFloat32) {
      if (kWhole || col + i < cols) {
        dev::store_global(at + i, word);
      }
    } else if constexpr (kWhole) {
      dev::store_global(at + 2 * i, word);
    } else {
      store_word(row, col + 2 * i, cols, pairs_aligned, word);
    }
  };
  store(0, words.x);
  store(1, words.y);
  store(2, words.z);
  store(3, words.w);
}

// Columns `col` to `col` + 7 of a row of `cols` values, zeros past the end.
template <DType kType, bool kWhole>
TGA_DEVICE Chunk<kType> load_chunk(const ElementOf<kType>* row, int col, int cols, bool pairs_aligned) {
  Chunk<kType> chunk;
  TGA_UNROLL
  for (int i = 0; i < Chunk<kType>::kParts; ++i) {
    chunk.parts[i] = load_part<kType, kWhole>(row, col + i * Chunk<kType>::kValues, cols, pairs_aligned);
  }
  return chunk;
}
template <DType kType, bool kWhole>
TGA_DEVICE void store_chunk(ElementOf<kType>* row, int col, int cols, bool pairs_aligned, const Chunk<kType>& chunk) {
  TGA_UNROLL
  for (int i = 0; i < Chunk<kType>::kParts; ++i) {
    store_part<kType, kWhole>(row, col + i * Chunk<kType>::kValues, cols, pairs_aligned, chunk.parts[i]);
  }
}

template <DType kType>
TGA_DEVICE void unpack_chunk(float (&x)[8], const Chunk<kType>& chunk) {
  TGA_UNROLL
  for (int part = 0; part < Chunk<kType>::kParts; ++part) {
    const uint32_t w[4] = {chunk.parts[part].x, chunk.parts[part].y, chunk.parts[part].z, chunk.parts[part].w};
    TGA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == DType::kFloat32) {
        x[4 * part + i] = dev::as_float(w[i]);
      } else {
        const Float2 pair = dev::unpack<kType>(w[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    }
  }
}
template <DType kType>
TGA_DEVICE Chunk<kType> pack_chunk(const float (&x)[8]) {
  if constexpr (kType == DType::kFloat32) {
    return {{{dev::as_word(x[0]), dev::as_word(x[1]), dev::as_word(x[2]), dev::as_word(x[3])},
             {dev::as_word(x[4]), dev::as_word(x[5]), dev::as_word(x[6]), dev::as_word(x[7])}}};
  } else {
    return {{{dev::pack<kType>(x[0], x[1]), dev::pack<kType>(x[2], x[3]), dev::pack<kType>(x[4], x[5]),
              dev::pack<kType>(x[6], x[7])}}};
  }
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
