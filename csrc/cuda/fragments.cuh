// SPDX-License-Identifier: BSD-3-Clause
//
// Fragments and tiles: how operands get from global memory to shared memory and to the registers of mma.m16n8k16, or, by
// tf32.cuh, of mma.m16n8k8.
#pragma once

#include "tf32.cuh"

namespace torch_gated_attn::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Columns `col` and `col` + 1 of a row of `cols` values as one word; zero past the end. `pairs_aligned`: 4-byte loads are
// allowed.
TGA_DEVICE uint32_t load_pair(const uint16_t* row, int col, int cols, bool pairs_aligned) {
  if (pairs_aligned && col + 1 < cols) {
    return dev::load_global<uint32_t>(row + col);
  }
  uint32_t word = 0;
  if (col < cols) {
    word = dev::load_global<uint16_t>(row + col);
  }
  if (col + 1 < cols) {
    word |= static_cast<uint32_t>(dev::load_global<uint16_t>(row + col + 1)) << 16;
  }
  return word;
}

template <DType kType>
TGA_DEVICE void store_half_pair(uint16_t* row, int col, int cols, bool pairs_aligned, float x, float y) {
  const uint32_t word = dev::pack<kType>(x, y);
  if (pairs_aligned && col + 1 < cols) {
    dev::store_global<uint32_t>(row + col, word);
    return;
  }
  if (col < cols) {
    dev::store_global<uint16_t>(row + col, static_cast<uint16_t>(word));
  }
  if (col + 1 < cols) {
    dev::store_global<uint16_t>(row + col + 1, static_cast<uint16_t>(word >> 16));
  }
}

// Stores two values as columns `col` and `col` + 1.
template <DType kType>
TGA_DEVICE void store_pair(ElementOf<kType>* row, int col, int cols, bool pairs_aligned, float x, float y) {
  if constexpr (kType == DType::kFloat32) {
    if (pairs_aligned && col + 1 < cols) {
      dev::store_global(row + col, Float2{x, y});
      return;
    }
    if (col < cols) {
      dev::store_global(row + col, x);
    }
    if (col + 1 < cols) {
      dev::store_global(row + col + 1, y);
    }
  } else {
    store_half_pair<kType>(row, col, cols, pairs_aligned, x, y);
  }
}

// Columns `col` and `col` + 1 of a row as numbers; zero past the end. `pairs_aligned`: one load may bring both.
template <DType kType>
TGA_DEVICE Float2 load_values(const ElementOf<kType>* row, int col, int cols, bool pairs_aligned) {
  if constexpr (kType != DType::kFloat32) {
    return dev::unpack<kType>(load_pair(row, col, cols, pairs_aligned));
  } else {
    if (pairs_aligned && col + 1 < cols) {
      return dev::load_global<Float2>(row + col);
    }
    return {col < cols ? dev::load_global<float>(row + col) : 0.0f,
            col + 1 < cols ? dev::load_global<float>(row + col + 1) : 0.0f};
  }
}
template <DType kType>
TGA_DEVICE float load_value(const ElementOf<kType>* at) {
  if constexpr (kType != DType::kFloat32) {
    return dev::unpack<kType>(dev::load_global<uint16_t>(at)).x;
  } else {
    return dev::load_global<float>(at);
  }
}

// Stores element `at`, a float if `is_float` or else of kType.
template <DType kType>
TGA_DEVICE void store_value(void* data, int64_t at, float x, bool is_float) {
  if constexpr (kType != DType::kFloat32) {
    if (!is_float) {
      dev::store_global(static_cast<uint16_t*>(data) + at, static_cast<uint16_t>(dev::pack<kType>(x, 0.0f)));
      return;
    }
  }
  dev::store_global(static_cast<float*>(data) + at, x);
}

template <int kSteps>
TGA_DEVICE void load_half_rows(uint32_t (&fragment)[kSteps][4], const uint16_t* data, int64_t row_stride, int first_row,
                               int rows, int cols, bool pairs_aligned) {
  const Lane lane = this_lane();
  TGA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane.row + 8 * i;
    const uint16_t* start = data + row * row_stride;
    TGA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      TGA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int col = step * 16 + half * 8 + lane.pair * 2;
        fragment[step][half * 2 + i] = row < rows ? load_pair(start, col, cols, pairs_aligned) : 0u;
      }
    }
  }
}

// A 16 x head_dim tile as the A operand of T::kSteps products, straight from global memory: it is read once, so shared
// memory would only add a trip. Rows past `rows` are zero.
template <class T>
TGA_DEVICE void load_rows(uint32_t (&fragment)[T::kFragments][4], const typename T::Element* data, int64_t row_stride,
                          int first_row, int rows, int cols, bool pairs_aligned) {
  if constexpr (T::kTf32) {
    load_rows_tf32<T>(fragment, data, row_stride, first_row, rows, cols);
  } else {
    load_half_rows<T::kSteps>(fragment, data, row_stride, first_row, rows, cols, pairs_aligned);
  }
}

// Fragments of the stationary operand: in registers, or, where those are short, in shared memory that no other thread
// touches.
template <int kCount, int kSteps, int kThreads, bool kInShared>
class PrivateFragments {
 public:
  static constexpr uint32_t kBytes = kInShared ? kCount * kSteps * kThreads * 16 : 0;

  TGA_DEVICE explicit PrivateFragments(uint32_t shared) : base_(shared + dev::thread_index() * 16) {}

  TGA_DEVICE void put(int i, const uint32_t (&fragment)[kSteps][4]) {
    TGA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const Word4 words = {fragment[step][0], fragment[step][1], fragment[step][2], fragment[step][3]};
      if constexpr (kInShared) {
        dev::store_shared(address(i, step), words);
      } else {
        kept_[i][step] = words;
      }
    }
  }
  TGA_DEVICE void get(int i, uint32_t (&fragment)[kSteps][4]) const {
    TGA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      Word4 words;
      if constexpr (kInShared) {
        words = dev::load_shared<Word4>(address(i, step));
      } else {
        words = kept_[i][step];
      }
      fragment[step][0] = words.x;
      fragment[step][1] = words.y;
      fragment[step][2] = words.z;
      fragment[step][3] = words.w;
    }
  }

 private:
  TGA_DEVICE uint32_t address(int i, int step) const { return base_ + (i * kSteps + step) * kThreads * 16; }

  uint32_t base_;
  Word4 kept_[kInShared ? 1 : kCount][kSteps];
};

// Two pointers that are needed once per tile: in registers or in shared memory, as PrivateFragments.
template <int kThreads, bool kInShared>
class PrivatePointers {
 public:
  static constexpr uint32_t kBytes = kInShared ? kThreads * 16 : 0;

  TGA_DEVICE explicit PrivatePointers(uint32_t shared) : at_(shared + dev::thread_index() * 16) {}

  TGA_DEVICE void put(const void* first, const void* second) {
    const uint64_t a = reinterpret_cast<uint64_t>(first), b = reinterpret_cast<uint64_t>(second);
    kept_ = {static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b),
             static_cast<uint32_t>(b >> 32)};
    if constexpr (kInShared) {
      dev::store_shared(at_, kept_);
    }
  }
  TGA_DEVICE void get(const char*& first, const char*& second) const {
    const Word4 words = kInShared ? dev::load_shared<Word4>(at_) : kept_;
    first = dev::global_pointer(words.x | static_cast<uint64_t>(words.y) << 32);
    second = dev::global_pointer(words.z | static_cast<uint64_t>(words.w) << 32);
  }

 private:
  uint32_t at_;
  Word4 kept_ = {};
};

// Negates both halves of every word: a negative scale is folded into the operand that stays in registers.
template <int kSteps>
TGA_DEVICE void negate(uint32_t (&fragment)[kSteps][4]) {
  TGA_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    TGA_UNROLL
    for (int i = 0; i < 4; ++i) {
      fragment[step][i] ^= 0x80008000u;
    }
  }
}

// B fragments of 8 rows of a shared tile, all of head_dim: result = A * rows^T. One ldmatrix brings two k steps, or, where
// there is only one, that of 16 rows.
template <int kSteps>
constexpr int kRowsPerLoad = kSteps == 1 ? 16 : 8;

template <int kSteps, uint32_t kRowBytes>
TGA_DEVICE void load_rows_as_columns(uint32_t (&b)[(kSteps + 1) / 2][4], uint32_t tile, int first_row) {
  const int lane = dev::thread_index() % 32;
  if constexpr (kSteps == 1) {
    dev::load_matrices(b[0], tile + swizzled<kRowBytes>(lane / 16 * 8 + lane % 8, lane / 8 % 2) + first_row * kRowBytes);
    return;
  }
  // Tiles are aligned to 256 bytes, the longest row, and the swizzle is an exclusive or, so chunk 4 * x is one away by
  // another one.
  const uint32_t first = tile + swizzled<kRowBytes>(lane % 8, lane / 8);
  TGA_UNROLL
  for (int x = 0; x < (kSteps + 1) / 2; ++x) {
    // With one step left the lanes for the other one read the same again.
    const uint32_t at = 2 * x + 1 < kSteps ? first : tile + swizzled<kRowBytes>(lane % 8, lane / 8 % 2);
    dev::load_matrices(b[x], (at ^ (x * 64)) + first_row * kRowBytes);
  }
}

// Puts values of the layout of accumulators into half e of a 16 x 16 A operand.
template <class T>
TGA_DEVICE void put_operand(uint32_t (&operand)[T::kOperandWords], int e, const float (&v)[4]) {
  if constexpr (T::kTf32) {
    operand[4 * e] = dev::as_word(v[0]);
    operand[4 * e + 1] = dev::as_word(v[2]);
    operand[4 * e + 2] = dev::as_word(v[1]);
    operand[4 * e + 3] = dev::as_word(v[3]);
  } else {
    operand[2 * e] = dev::pack<T::kType>(v[0], v[1]);
    operand[2 * e + 1] = dev::pack<T::kType>(v[2], v[3]);
  }
}

template <DType kType, int kCols, uint32_t kRowBytes, int kRowTiles>
TGA_DEVICE void accumulate_half_rows(float (&acc)[kRowTiles][kCols][4], const uint32_t (&a)[kRowTiles][4], uint32_t tile,
                                     int first_row) {
  const int lane = dev::thread_index() % 32;
  const uint32_t first = tile + swizzled<kRowBytes>(lane % 16, lane / 16);
  TGA_UNROLL
  for (int x = 0; x < kCols / 2; ++x) {
    uint32_t b[4];
    dev::load_matrices_transposed(b, (first ^ (x * 32)) + first_row * kRowBytes);
    TGA_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      dev::mma<kType>(acc[m][2 * x], a[m], b[0], b[1], acc[m][2 * x]);
      dev::mma<kType>(acc[m][2 * x + 1], a[m], b[2], b[3], acc[m][2 * x + 1]);
    }
  }
}

// acc += a * tile[first_row : first_row + 16, :], the tile's rows being the k dimension.
template <class T>
TGA_DEVICE void accumulate_rows(float (&acc)[T::kRowTiles][T::kCols][4],
                                const uint32_t (&a)[T::kRowTiles][T::kOperandWords], uint32_t tile, int first_row) {
  if constexpr (T::kTf32) {
    accumulate_tf32<T>(acc, a, tile, first_row);
  } else {
    accumulate_half_rows<T::kType, T::kCols, T::kRowBytes>(acc, a, tile, first_row);
  }
}

template <DType kType, int kSteps>
TGA_DEVICE void multiply_half(float (&d)[4], const uint32_t (&a)[kSteps][4], const uint32_t (&b)[(kSteps + 1) / 2][4],
                              int subtile, const float (&c)[4]) {
  const int first = subtile * 8 % kRowsPerLoad<kSteps> / 4;
  dev::mma<kType>(d, a[0], b[0][first], b[0][first + 1], c);
  TGA_UNROLL
  for (int step = 1; step < kSteps; ++step) {
    dev::mma<kType>(d, a[step], b[step / 2][step % 2 * 2], b[step / 2][step % 2 * 2 + 1], d);
  }
}

// d = a * b + c over head_dim, b as load_rows_as_columns gives it for the rows that contain those of this product:
// `subtile` is its place among the 8-row tiles of a tile.
template <class T>
TGA_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[T::kFragments][4], const uint32_t (&b)[(T::kSteps + 1) / 2][4],
                         int subtile, const float (&c)[4]) {
  if constexpr (T::kTf32) {
    multiply_tf32<T, false>(d, a, b);
    TGA_UNROLL
    for (int i = 0; i < 4; ++i) {
      d[i] += c[i];
    }
  } else {
    multiply_half<T::kType, T::kSteps>(d, a, b, subtile, c);
  }
}

// The share of one thread in copying tiles of kBlock rows from global to shared memory by 16-byte chunks: the same chunk of
// rows a multiple of 8 apart, so that one swizzled offset serves them all.
template <class T, int kThreads>
struct TileCopy {
  static constexpr int kChunks = T::kHeadDim / T::kChunk;
  static constexpr int kRowsPerPass = kThreads / kChunks / 8 * 8;
  static constexpr int kPasses = (T::kBlock + kRowsPerPass - 1) / kRowsPerPass;
  static_assert(kRowsPerPass > 0 && (32 % kRowsPerPass == 0 || kRowsPerPass % 32 == 0),
                "a pass is a fixed piece of mask words");

  int row, chunk;
  uint32_t shared_offset;

  TGA_DEVICE explicit TileCopy(int thread)
      : row(thread / kChunks), chunk(thread % kChunks), shared_offset(swizzled<T::kRowBytes>(row, chunk)) {}

  // Whether this thread copies anything in a pass.
  TGA_DEVICE bool has(int pass) const {
    constexpr bool kAllThreads = kRowsPerPass * kChunks == kThreads;
    return (kAllThreads || row < kRowsPerPass) && (T::kBlock % kRowsPerPass == 0 || row + pass * kRowsPerPass < T::kBlock);
  }
};

// Bytes of a 16-byte chunk that lie inside a row of `cols` values.
template <class T>
TGA_DEVICE int chunk_bytes(int chunk, int cols) {
  const int left = (cols - chunk * T::kChunk) * static_cast<int>(sizeof(typename T::Element));
  return left < 0 ? 0 : left > 16 ? 16 : left;
}

// One chunk of a 16-bit operand, `bytes` of it, zeros behind them. kWhole: 0 or 16, and always aligned. Without alignment
// the values go through registers, which the block barrier before the tile's use makes visible just as well.
template <bool kWhole>
TGA_DEVICE void copy_chunk(uint32_t shared, const char* global, int bytes, bool aligned) {
  if constexpr (kWhole) {
    dev::copy_async(shared, global, bytes > 0);
  } else if (aligned) {
    dev::copy_async_part(shared, global, bytes);
  } else {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(global);
    dev::store_shared(shared, Word4{load_pair(row, 0, bytes / 2, false), load_pair(row, 2, bytes / 2, false),
                                    load_pair(row, 4, bytes / 2, false), load_pair(row, 6, bytes / 2, false)});
  }
}

// Byte offset of a row. The fast kernels are only chosen where a row stride in bytes fits 32 bits: one instruction, not
// four.
template <class T>
TGA_DEVICE int64_t row_offset(int row, int64_t stride) {
  constexpr int kBytes = sizeof(typename T::Element);
  if constexpr (T::kGeneral) {
    return row * stride * kBytes;
  } else {
    return dev::multiply_wide(row, static_cast<int>(stride) * kBytes);
  }
}

}  // namespace torch_gated_attn::cuda
