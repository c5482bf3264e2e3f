// SPDX-License-Identifier: BSD-3-Clause
//
// Which key tiles a block visits, and in which order: tiles that every batch row of the block attends in full, then the
// mixed ones; tiles that no row attends are left out. So the first loop needs no mask and no bounds, and the mask costs
// what it hides. Built in shared memory, a panel of keys at a time, so that any number of keys fits.
#pragma once

#include "fragments.cuh"

namespace torch_gated_attn::cuda {

constexpr int kPanelKeys = 4096;

// One byte per key, the rows of a block `row_stride` apart; null: every key is attended.
struct KeyMask {
  const uint8_t* data;
  int64_t row_stride, col_stride;
};

template <int kRows, int kBlock, int kThreads>
class TilePlan {
 public:
  static constexpr int kPanelWords = kPanelKeys / 32, kTiles = kPanelKeys / kBlock, kTileWords = kBlock / 32;
  static constexpr uint32_t kBits = 0, kList = kRows * kPanelWords * 4, kCounts = kList + kTiles * 4;
  static constexpr uint32_t kBytes = (kCounts + 8 + 255) / 256 * 256;
  static_assert(kBlock % 32 == 0, "a tile is whole words of mask bits");

  TGA_DEVICE explicit TilePlan(uint32_t shared) : shared_(shared) {}

  // Called by the whole block. `rows`: how many of the kRows exist, the rest attend nothing.
  TGA_DEVICE void build(const KeyMask& mask, int rows, int panel, int k_len) {
    const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
    const int keys = k_len - panel < kPanelKeys ? k_len - panel : kPanelKeys;
    const int tiles = (keys + kBlock - 1) / kBlock, words = tiles * kTileWords;
    dev::sync_block();  // the previous panel's plan and tiles are no longer read
    for (int i = warp; i < kRows * words; i += kThreads / 32) {
      const int row = i / words, word = i % words, key = panel + word * 32 + lane;
      bool attended = key < k_len && row < rows;
      if (attended && mask.data != nullptr) {
        attended = dev::load_global<uint8_t>(mask.data + row * mask.row_stride + key * mask.col_stride) != 0;
      }
      const uint32_t bits = dev::ballot(attended);
      if (lane == 0) {
        dev::store_shared(shared_ + kBits + (row * kPanelWords + word) * 4, bits);
      }
    }
    dev::sync_block();
    if (warp == 0) {
      write_list(rows, tiles, lane);
    }
    dev::sync_block();
    full_ = dev::load_shared<uint32_t>(shared_ + kCounts);
    total_ = dev::load_shared<uint32_t>(shared_ + kCounts + 4);
  }

  TGA_DEVICE int full() const { return full_; }    // entries of the list without a masked key
  TGA_DEVICE int total() const { return total_; }  // entries of the list
  // First key, within the panel, of the i-th tile to visit.
  TGA_DEVICE uint32_t key(int i) const { return dev::load_shared<uint32_t>(shared_ + kList + i * 4); }
  // Where the mask words of a row begin, from the tile that begins at `key` on.
  TGA_DEVICE uint32_t bits_address(int row, uint32_t key) const {
    return shared_ + kBits + row * (kPanelWords * 4) + key / 8;
  }
  // The word that holds the key `offset` places into that tile.
  TGA_DEVICE uint32_t bits(int row, uint32_t key, int offset) const {
    return dev::load_shared<uint32_t>(bits_address(row, key) + offset / 32 * 4);
  }

 private:
  enum Kind { kEmpty, kFull, kMixed };

  TGA_DEVICE Kind classify(int rows, int tile) const {
    uint32_t all = 0xffffffffu, some = 0;
    for (int row = 0; row < rows; ++row) {
      for (int word = 0; word < kTileWords; ++word) {
        const uint32_t b = bits(row, tile * kBlock, word * 32);
        all &= b;
        some |= b;
      }
    }
    return some == 0 ? kEmpty : all == 0xffffffffu ? kFull : kMixed;
  }

  // One warp compacts the tile numbers with votes.
  TGA_DEVICE void write_list(int rows, int tiles, int lane) {
    uint32_t count = 0;
    for (int kind = kFull; kind <= kMixed; ++kind) {
      for (int first = 0; first < tiles; first += 32) {
        const int tile = first + lane;
        const bool listed = tile < tiles && classify(rows, tile) == kind;
        const uint32_t votes = dev::ballot(listed);
        if (listed) {
          const uint32_t before = dev::count_bits(votes & ((1u << lane) - 1));
          dev::store_shared(shared_ + kList + (count + before) * 4, static_cast<uint32_t>(tile * kBlock));
        }
        count += dev::count_bits(votes);
      }
      if (lane == 0) {
        dev::store_shared(shared_ + kCounts + (kind == kFull ? 0 : 4), count);
      }
    }
  }

  uint32_t shared_;
  int full_ = 0, total_ = 0;
};

}  // namespace torch_gated_attn::cuda
