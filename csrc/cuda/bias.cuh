// SPDX-License-Identifier: BSD-3-Clause
//
// The bias in score fragments.
#pragma once

#include "logits.cuh"

namespace torch_gated_attn::cuda {

// Bias rows of this thread: bias / scale as the C operand of the first product, so that sharing it between batch rows is
// free. A finite bias stays finite (rounding toward zero), -inf stays -inf. For float32 operands the bias as it is.
template <class T>
class BiasRows {
 public:
  // `shared`: where the pointers go if the tile keeps such things in shared memory.
  TGA_DEVICE BiasRows(const Operand& bias, const void* data, int first_row, int q_len, float inverse_scale,
                      uint32_t shared = 0)
      : inverse_scale_(inverse_scale), kept_(shared) {
    const Lane lane = this_lane();
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      TGA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + m * 16 + lane.row + 8 * i;
        // Rows past the end repeat the last: their results are never stored.
        rows_[m][i] = static_cast<const Element*>(data) + (row < q_len ? row : q_len - 1) * bias.row + lane.pair * 2;
      }
    }
    if constexpr (kInShared) {
      kept_.put(rows_[0][0], rows_[0][1]);
    }
  }

  // Before the loads of a tile.
  TGA_DEVICE void begin_tile() {
    if constexpr (kInShared) {
      const char *first, *second;
      kept_.get(first, second);
      rows_[0][0] = reinterpret_cast<const Element*>(first);
      rows_[0][1] = reinterpret_cast<const Element*>(second);
    }
  }

  // The 8 keys from `tile` + `offset` on; with kBounded, keys from `k_len` on are not read. The two are apart because the
  // offset is a constant, which costs nothing in an address.
  template <bool kBounded>
  TGA_DEVICE void load(float (&c)[T::kRowTiles][4], int tile, int offset, int k_len) const {
    const int first = tile + offset + this_lane().pair * 2;
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      TGA_UNROLL
      for (int i = 0; i < 2; ++i) {
        Float2 pair = {0.0f, 0.0f};
        if (!kBounded || first + 1 < k_len) {
          pair = read_pair(rows_[m][i] + tile + offset);
        } else if (first < k_len) {
          pair.x = read_one(rows_[m][i] + tile + offset);
        }
        c[m][2 * i] = scaled(pair.x);
        c[m][2 * i + 1] = scaled(pair.y);
      }
    }
  }

 private:
  TGA_DEVICE float scaled(float bias) const { return T::kTf32 ? bias : dev::multiply_toward_zero(bias, inverse_scale_); }

  static constexpr bool kIsFloat = T::kBias == BiasAccess::kFloat;
  using Element = std::conditional_t<kIsFloat, float, uint16_t>;

  static TGA_DEVICE Float2 read_pair(const Element* p) {
    if constexpr (kIsFloat) {
      return dev::load_global<Float2>(p);
    } else {
      return dev::unpack<T::kType>(dev::load_global<uint32_t>(p));
    }
  }
  static TGA_DEVICE float read_one(const Element* p) {
    if constexpr (kIsFloat) {
      return dev::load_global<float>(p);
    } else {
      return dev::unpack<T::kType>(dev::load_global<uint16_t>(p)).x;
    }
  }

  static constexpr bool kInShared = T::kStationaryInShared && T::kRowTiles == 1;

  const Element* rows_[T::kRowTiles][2];
  float inverse_scale_;
  PrivatePointers<T::kThreads, kInShared> kept_;
};

// The bias itself as C operands of the transposed scores, for the key tiles of one warp: a load to a score, which float32
// operands make small beside their products.
template <class T>
class BiasColumns {
 public:
  // `data`: of the head's first query and key.
  TGA_DEVICE BiasColumns(const AttentionParams& p, const void* data, int first_key, int first_query)
      : data_(static_cast<const float*>(data)),
        row_(p.bias.row),
        q_len_(p.q_len),
        query_(first_query + this_lane().pair * 2) {
    TGA_UNROLL
    for (int i = 0; i < 2 * T::kRowTiles; ++i) {
      const int key = first_key + this_lane().row + 8 * i;
      key_[i] = key < p.k_len ? key : p.k_len - 1;
    }
  }

  // The 16 queries that begin at `query` of the tile, for key tile m: c[0] the first 8, c[1] the others. Rows and columns
  // past the ends repeat the last.
  TGA_DEVICE void load(float (&c)[2][4], int query, int m) const {
    TGA_UNROLL
    for (int e = 0; e < 2; ++e) {
      TGA_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int at = query_ + query + 8 * e + j;
        const float* const row = data_ + (at < q_len_ ? at : q_len_ - 1) * row_;
        c[e][j] = dev::load_global<float>(row + key_[2 * m]);
        c[e][2 + j] = dev::load_global<float>(row + key_[2 * m + 1]);
      }
    }
  }
  TGA_DEVICE void next_tile() { query_ += T::kBlock; }

 private:
  const float* data_;
  int64_t row_;
  int q_len_, query_, key_[2 * T::kRowTiles];
};

// In place of BiasRows where the bias is not an operand of the product.
template <class T>
struct NoBias {
  TGA_DEVICE NoBias(const Operand&, const void*, int, int, float, uint32_t = 0) {}
  TGA_DEVICE void begin_tile() {}
};
template <class T>
using FragmentBias = std::conditional_t<T::kBiasFragments, BiasRows<T>, NoBias<T>>;

}  // namespace torch_gated_attn::cuda
