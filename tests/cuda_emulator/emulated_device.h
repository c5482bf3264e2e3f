// SPDX-License-Identifier: BSD-3-Clause
//
// The interface of csrc/cuda/device.cuh on the host. Fragment layouts are those of the PTX manual for ldmatrix and
// mma.m16n8k16: lane l holds rows l / 4 and columns 2 * (l % 4) of every 8x8 matrix. The operands of mma.m16n8k8 have 4
// columns to a word, and lane l column l % 4 of each 4.
#pragma once

#include <cmath>
#include <set>

#include "block.h"

namespace emulator {

inline unsigned schedule_seed = 1;
inline std::set<void*> launched;   // addresses of the kernels of this call
inline void* launching = nullptr;  // the one that runs

// A tile of pairs that a kernel computed.
struct Tile {
  void* kernel;
  int64_t entry;
  int head, query, queries, key, keys;
  bool masked;
};
inline std::vector<Tile> tiles;  // of this call

enum Operation { kLdmatrix = 1, kLdmatrixTransposed, kMma, kMmaTf32, kShuffle, kVote, kTranspose };

// 0x7fff is the device's NaN.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return 0x7fff;
  }
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t to_float16(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline float from_float16(uint16_t x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return static_cast<float>(h);
}

inline void ldmatrix(uint32_t (&r)[4], uint32_t address, bool transposed) {
  block->shared.touch(address, 16, current->index, false);
  const int lane = current->index % 32;
  block->warps[current->index / 32].in[lane][0] = address;
  collective(transposed ? kLdmatrixTransposed : kLdmatrix, [transposed](Warp& warp) {
    ++report.ldmatrix;
    for (int m = 0; m < 4; ++m) {
      // Eight rows of 16 bytes are read at once: each must come from its own group of four banks.
      int uses[8] = {};
      for (int row = 0; row < 8; ++row) {
        ++uses[warp.in[m * 8 + row][0] / 16 % 8];
      }
      report.bank_conflicts += *std::max_element(uses, uses + 8) - 1;
      for (int lane = 0; lane < 32; ++lane) {
        uint32_t word = 0;
        for (int e = 0; e < 2; ++e) {
          const int row = transposed ? lane % 4 * 2 + e : lane / 4, col = transposed ? lane / 4 : lane % 4 * 2 + e;
          word |= static_cast<uint32_t>(block->shared.peek16(warp.in[m * 8 + row][0] + col * 2)) << (16 * e);
        }
        warp.out[lane][m] = word;
      }
    }
  });
  std::memcpy(r, block->warps[current->index / 32].out[lane], 16);
}

template <class Unpack>
void mma_16x8x16(Warp& warp, Unpack unpack) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i & 1)][t * 2 + e + 8 * (i >> 1)] = unpack(static_cast<uint16_t>(warp.in[lane][i] >> (16 * e)));
      }
      for (int i = 0; i < 2; ++i) {
        b[t * 2 + e + 8 * i][g] = unpack(static_cast<uint16_t>(warp.in[lane][4 + i] >> (16 * e)));
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), col = lane % 4 * 2 + (i & 1);
      float sum = warp.in_float[lane][i];
      for (int k = 0; k < 16; ++k) {
        sum += a[row][k] * b[k][col];
      }
      warp.out_float[lane][i] = sum;
    }
  }
}

// The product of two floats is exact in double; the fused sum is off by less than a double's rounding.
inline float toward_zero(double exact) {
  const float nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.0f) : nearest;
}

constexpr uint32_t kBelowTf32 = 0x1fff;  // bits of a float that TF32 does not have

inline float as_float(uint32_t word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// Lower bits are dropped, and the sum is rounded toward zero, as tensor cores do.
inline void mma_16x8x8_tf32(Warp& warp) {
  double a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 6; ++i) {
      if ((warp.in[lane][i] & kBelowTf32) != 0) {
        note(report.unrounded, "an operand of a TF32 product that is no TF32 number", warp.in[lane][i], lane);
      }
      const double x = as_float(warp.in[lane][i] & ~kBelowTf32);
      (i < 4 ? a[g + 8 * (i & 1)][t + 4 * (i >> 1)] : b[t + 4 * (i - 4)][g]) = x;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), col = lane % 4 * 2 + (i & 1);
      double sum = warp.in_float[lane][i];
      for (int k = 0; k < 8; ++k) {
        sum += a[row][k] * b[k][col];
      }
      warp.out_float[lane][i] = toward_zero(sum);
    }
  }
}

}  // namespace emulator

namespace torch_gated_attn::cuda::dev {

inline int thread_index() { return emulator::current->index; }
inline int block_index() { return emulator::block->index; }
inline uint32_t shared_base() { return emulator::kSharedBase; }
inline void sync_warp() {
  emulator::collective(emulator::kVote, [](emulator::Warp&) {});
}
inline void sync_block() { emulator::suspend(emulator::State::kAtBarrier); }
inline bool sync_block_any(bool x) {
  emulator::block->any_thread |= x;
  sync_block();
  const bool any = emulator::block->any_thread;
  sync_block();
  emulator::block->any_thread = false;
  sync_block();
  return any;
}

inline void copy_async_part(uint32_t shared, const void* global, int bytes) {
  emulator::Copy copy = {shared, {}};
  if (bytes > 0 && emulator::global_memory.touch(global, bytes, 16, thread_index(), false)) {
    std::memcpy(copy.data, global, bytes);
  }
  emulator::block->shared.touch(shared, 16, thread_index(), true);
  emulator::current->open_copies.push_back(copy);
}
inline void copy_async(uint32_t shared, const void* global, bool valid) { copy_async_part(shared, global, valid ? 16 : 0); }
inline void commit_copies() {
  emulator::current->committed_copies.push_back(std::move(emulator::current->open_copies));
  emulator::current->open_copies.clear();
}
template <int kPending>
void wait_copies() {
  auto& committed = emulator::current->committed_copies;
  while (committed.size() > kPending) {
    for (const emulator::Copy& copy : committed.front()) {
      emulator::block->shared.write(copy.shared, copy.data, 16, thread_index());
    }
    committed.pop_front();
  }
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) { emulator::ldmatrix(r, address, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { emulator::ldmatrix(r, address, true); }

inline uint32_t transpose_matrix(uint32_t fragment) {
  const int lane = thread_index() % 32;
  emulator::Warp& mine = emulator::block->warps[thread_index() / 32];
  mine.in[lane][0] = fragment;
  emulator::collective(emulator::kTranspose, [](emulator::Warp& warp) {
    const auto element = [&warp](int row, int col) { return warp.in[row * 4 + col / 2][0] >> (col % 2 * 16) & 0xffffu; };
    for (int i = 0; i < 32; ++i) {
      warp.out[i][0] = element(i % 4 * 2, i / 4) | element(i % 4 * 2 + 1, i / 4) << 16;
    }
  });
  return mine.out[lane][0];
}

// Every lane hands its operands over, and takes its sums from the one `product` of the warp.
template <class Product>
void warp_product(int operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4],
                  Product product) {
  const int lane = thread_index() % 32;
  emulator::Warp& mine = emulator::block->warps[thread_index() / 32];
  std::memcpy(mine.in[lane], a, 16);
  mine.in[lane][4] = b0;
  mine.in[lane][5] = b1;
  std::memcpy(mine.in_float[lane], c, 16);
  emulator::collective(operation, [product](emulator::Warp& warp) {
    ++emulator::report.mma;
    product(warp);
  });
  std::memcpy(d, mine.out_float[lane], 16);
}

template <DType kType>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  warp_product(emulator::kMma, d, a, b0, b1, c, [](emulator::Warp& warp) {
    emulator::mma_16x8x16(warp, kType == DType::kBFloat16 ? emulator::from_bfloat16 : emulator::from_float16);
  });
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  warp_product(emulator::kMmaTf32, d, a, b0, b1, c, [](emulator::Warp& warp) { emulator::mma_16x8x8_tf32(warp); });
}

inline uint32_t as_word(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}
inline float as_float(uint32_t word) { return emulator::as_float(word); }

template <DType kType>
uint32_t pack(float low, float high) {
  const auto convert = kType == DType::kBFloat16 ? emulator::to_bfloat16 : emulator::to_float16;
  return convert(low) | static_cast<uint32_t>(convert(high)) << 16;
}
template <DType kType>
Float2 unpack(uint32_t word) {
  const auto convert = kType == DType::kBFloat16 ? emulator::from_bfloat16 : emulator::from_float16;
  return {convert(static_cast<uint16_t>(word)), convert(static_cast<uint16_t>(word >> 16))};
}

inline float exp2(float x) {
  ++emulator::report.exp2;
  return ::exp2f(x);
}
inline double exp2(double x) { return ::exp2(x); }
inline float log2(float x) { return ::log2f(x); }
inline double log2(double x) { return ::log2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline double reciprocal(double x) { return 1.0 / x; }
// As wrong as the device may be, up for some numbers and down for others.
inline float reciprocal_approx(float x) {
  const float nearest = 1.0f / x;
  int exponent;
  const float mantissa = std::frexp(x, &exponent);
  if (std::fabs(mantissa) == 0.5f || !std::isfinite(nearest) || nearest == 0.0f) {
    return nearest;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool above = static_cast<double>(nearest) * x > 1.0;  // the neighbour on the other side is within a unit
  return (bits >> 3 & 1) != 0 ? nearest : std::nextafterf(nearest, above ? 0.0f : INFINITY * (x > 0 ? 1.0f : -1.0f));
}

using emulator::toward_zero;
inline float multiply(float x, float y) { return x * y; }
inline float multiply_toward_zero(float x, float y) { return toward_zero(static_cast<double>(x) * y); }
inline float fma_toward_zero(float x, float y, float z) { return toward_zero(static_cast<double>(x) * y + z); }
// Nearest is as good but for overflow, which here must stop at the largest finite number.
inline double fma_toward_zero(double x, double y, double z) {
  const double sum = std::fma(x, y, z);
  return std::isinf(sum) && std::isfinite(x) && std::isfinite(y) && std::isfinite(z) ? std::nextafter(sum, 0.0) : sum;
}

inline void count_tile(int64_t entry, int head, int query, int queries, int key, int keys, bool masked) {
  emulator::tiles.push_back({emulator::launching, entry, head, query, queries, key, keys, masked});
}

inline int opaque(int x) { return x; }

inline const char* global_pointer(uint64_t bits) { return reinterpret_cast<const char*>(bits); }
inline int64_t multiply_wide(int x, int y) { return static_cast<int64_t>(x) * y; }

inline float shuffle_xor(float x, int lanes) {
  const int lane = thread_index() % 32;
  emulator::Warp& mine = emulator::block->warps[thread_index() / 32];
  mine.in_float[lane][0] = x;
  emulator::collective(emulator::kShuffle, [lanes](emulator::Warp& warp) {
    for (int i = 0; i < 32; ++i) {
      warp.out_float[i][0] = warp.in_float[i ^ lanes][0];
    }
  });
  return mine.out_float[lane][0];
}
inline double shuffle_xor(double x, int lanes) {
  const int lane = thread_index() % 32;
  emulator::Warp& mine = emulator::block->warps[thread_index() / 32];
  mine.in_double[lane] = x;
  emulator::collective(emulator::kShuffle, [lanes](emulator::Warp& warp) {
    for (int i = 0; i < 32; ++i) {
      warp.out_double[i] = warp.in_double[i ^ lanes];
    }
  });
  return mine.out_double[lane];
}
inline uint32_t ballot(bool x) {
  const int lane = thread_index() % 32;
  emulator::Warp& mine = emulator::block->warps[thread_index() / 32];
  mine.in[lane][0] = x;
  emulator::collective(emulator::kVote, [](emulator::Warp& warp) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) {
      votes |= warp.in[i][0] << i;
    }
    for (int i = 0; i < 32; ++i) {
      warp.out[i][0] = votes;
    }
  });
  return mine.out[lane][0];
}
inline bool any(bool x) { return ballot(x) != 0; }
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

template <class T>
T load_global(const void* p) {
  T value{};
  if (emulator::global_memory.touch(p, sizeof(T), sizeof(T), thread_index(), false)) {
    std::memcpy(&value, p, sizeof(T));
  }
  return value;
}
template <class T>
void store_global(void* p, T value) {
  if (emulator::global_memory.touch(p, sizeof(T), sizeof(T), thread_index(), true)) {
    std::memcpy(p, &value, sizeof(T));
  }
}
template <class T>
T load_shared(uint32_t address) {
  T value;
  emulator::block->shared.read(address, &value, sizeof(T), thread_index());
  return value;
}
template <class T>
void store_shared(uint32_t address, T value) {
  emulator::block->shared.write(address, &value, sizeof(T), thread_index());
}

template <class Params>
void launch(void (*kernel)(Params), Params params, int64_t blocks, int threads, size_t shared_bytes, void*, const char*) {
  emulator::launching = reinterpret_cast<void*>(kernel);
  emulator::launched.insert(emulator::launching);
  std::mt19937 random(emulator::schedule_seed);
  params.first_block = 0;
  const std::function<void()> body = [&] { kernel(params); };
  for (int64_t index = 0; index < blocks; ++index) {
    emulator::run_block(static_cast<int>(index), threads, shared_bytes, body, random);
  }
}

}  // namespace torch_gated_attn::cuda::dev
