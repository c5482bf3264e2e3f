// SPDX-License-Identifier: BSD-3-Clause
//
// The bias in score fragments, and the mask of a score tile.
#pragma once

#include "tile_plan.cuh"

namespace torch_gated_attn::cuda {

// Bias rows of this thread: bias / scale as the C operand of the first product, so that sharing it between batch rows is
// free. A finite bias stays finite (rounding toward zero), -inf stays -inf.
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
        c[m][2 * i] = dev::multiply_toward_zero(pair.x, inverse_scale_);
        c[m][2 * i + 1] = dev::multiply_toward_zero(pair.y, inverse_scale_);
      }
    }
  }

 private:
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

// In place of BiasRows where the bias is not an operand of the product.
template <class T>
struct NoBias {
  TGA_DEVICE NoBias(const Operand&, const void*, int, int, float, uint32_t = 0) {}
  TGA_DEVICE void begin_tile() {}
};
template <class T>
using FragmentBias = std::conditional_t<T::kBiasFragments, BiasRows<T>, NoBias<T>>;

// The place of element `offset` of 2- or 4-byte elements; null stays null.
TGA_DEVICE const void* element(const void* data, int64_t offset, bool is_float) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + offset * (is_float ? 4 : 2);
}

// One element at a time, any strides, either type: the general kernels' access to bias and mask.
template <DType kType>
struct GeneralLogits {
  const void* bias;     // of this batch entry and head, null without
  const uint8_t* mask;  // likewise
  int64_t bias_row, bias_col, mask_row, mask_col;
  bool bias_is_float;

  TGA_DEVICE GeneralLogits(const AttentionParams& p, const SlabIndex& slab, int64_t batch_row, int head)
      : bias(element(p.bias.data, p.bias.offset(slab, batch_row, head), p.bias_is_float)),
        mask(nullptr),
        bias_row(p.bias.row),
        bias_col(p.bias.col),
        mask_row(p.mask.row),
        mask_col(p.mask.col),
        bias_is_float(p.bias_is_float) {
    if (p.mask.data != nullptr) {
      mask = static_cast<const uint8_t*>(p.mask.data) + p.mask.offset(slab, batch_row, head);
    }
  }

  // The logit of an existing pair in units of log2, from its scaled product in the same units.
  TGA_DEVICE float operator()(int64_t query, int64_t key, float product) const {
    if (mask != nullptr && dev::load_global<uint8_t>(mask + query * mask_row + key * mask_col) == 0) {
      return -INFINITY;
    }
    if (bias == nullptr) {
      return product;
    }
    const int64_t at = query * bias_row + key * bias_col;
    const float b = bias_is_float
                        ? dev::load_global<float>(static_cast<const float*>(bias) + at)
                        : dev::unpack<kType>(dev::load_global<uint16_t>(static_cast<const uint16_t*>(bias) + at)).x;
    return dev::fma_toward_zero(b, kLog2e, product);
  }
};

}  // namespace torch_gated_attn::cuda
