// SPDX-License-Identifier: BSD-3-Clause
//
// Which key tiles a block visits, and in which order: tiles that every query of every batch row of the block attends to in
// full, then the mixed ones; tiles in which nothing is attended are left out, and none outside of what the queries see is
// looked at. So the first loop needs no mask and no bounds, and a mask costs what it hides. Built in shared memory, a panel
// of keys at a time, so that any number of keys fits.
#pragma once

#include "fragments.cuh"
#include "sight.cuh"

namespace torch_gated_attn::cuda {

constexpr int kLongestPanel = 4096;

template <int kRows, int kBlock, int kThreads, int kPanelKeys = kLongestPanel>
class TilePlan {
 public:
  static constexpr int kPanel = kPanelKeys, kPanelWords = kPanelKeys / 32, kTiles = kPanelKeys / kBlock,
                       kTileWords = kBlock / 32;
  static constexpr uint32_t kBits = 0, kList = kRows * kPanelWords * 4, kCounts = kList + kTiles * 4, kMask = kCounts + 8;
  static constexpr uint32_t kBytes = (kMask + 8 + 255) / 256 * 256;
  static_assert(kBlock % 32 == 0, "a tile is whole words of mask bits");

  TGA_DEVICE explicit TilePlan(uint32_t shared) : shared_(shared) {}

  // Of the panel that begins at key `panel`, a multiple of kBlock, the tiles that hold some of `keys`. Called by the whole
  // block. `rows`: how many of the kRows exist, the rest attend nothing.
  TGA_DEVICE void build(const BlockSight& sight, int rows, int panel, Range<int> keys) {
    const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
    keys = keys.within({panel, panel + kPanelKeys});
    const int first = keys.empty() ? 0 : (keys.begin - panel) / kBlock;
    const int end = keys.empty() ? 0 : (keys.end - panel + kBlock - 1) / kBlock;
    dev::sync_block();  // the previous panel's plan and tiles are no longer read
    for (int tile = first + warp; tile < end; tile += kThreads / 32) {
      uint32_t some = 0, all = 0xffffffffu;
      for (int row = 0; row < kRows; ++row) {
        TGA_UNROLL
        for (int word = 0; word < kTileWords; ++word) {
          const int at = tile * kTileWords + word;
          const KeyVotes votes = row < rows ? sight.vote(row, panel + at * 32) : KeyVotes{0, 0xffffffffu};
          some |= votes.some;
          all &= votes.all;
          if (lane == 0) {
            dev::store_shared(shared_ + kBits + (row * kPanelWords + at) * 4, votes.some);
          }
        }
      }
      if (lane == 0) {
        const Cover partly = some == 0 ? Cover::kEmpty : Cover::kMixed;
        const Cover cover = all == 0xffffffffu ? Cover::kFull : partly;
        dev::store_shared(shared_ + kList + tile * 4, static_cast<uint32_t>(cover));
      }
    }
    if (dev::thread_index() == 0) {
      const uint64_t mask = sight.mask_is_of_pairs() ? reinterpret_cast<uint64_t>(sight.mask) : 0;
      dev::store_shared(shared_ + kMask, static_cast<uint32_t>(mask));
      dev::store_shared(shared_ + kMask + 4, static_cast<uint32_t>(mask >> 32));
    }
    dev::sync_block();
    if (warp == 0) {
      write_list(first, end, lane);
    }
    dev::sync_block();
    full_ = dev::load_shared<uint32_t>(shared_ + kCounts);
    total_ = dev::load_shared<uint32_t>(shared_ + kCounts + 4);
  }

  TGA_DEVICE int full() const { return full_; }    // entries of the list without a hidden pair
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

  // A row's mask of pairs, which waits in shared memory, not in registers.
  TGA_DEVICE PairMask pair_mask(const AttentionParams& p, int row) const {
    const uint64_t low = dev::load_shared<uint32_t>(shared_ + kMask),
                   high = dev::load_shared<uint32_t>(shared_ + kMask + 4);
    if ((low | high) == 0) {
      return {};
    }
    return {reinterpret_cast<const uint8_t*>(dev::global_pointer(high << 32 | low)) + row * p.mask.batch_row};
  }
  // Whether a row attends to nothing of that tile.
  TGA_DEVICE bool empty(int row, uint32_t key) const {
    uint32_t some = 0;
    TGA_UNROLL
    for (int word = 0; word < kTileWords; ++word) {
      some |= bits(row, key, word * 32);
    }
    return some == 0;
  }

 private:
  // One warp replaces what each tile is by the list of those to visit, with votes.
  TGA_DEVICE void write_list(int first, int end, int lane) {
    constexpr int kTilesPerLane = (kTiles + 31) / 32;
    Cover covers[kTilesPerLane];
    TGA_UNROLL
    for (int i = 0; i < kTilesPerLane; ++i) {
      const int tile = i * 32 + lane;
      covers[i] = tile < first || tile >= end ? Cover::kEmpty
                                              : static_cast<Cover>(dev::load_shared<uint32_t>(shared_ + kList + tile * 4));
    }
    dev::sync_warp();
    uint32_t count = 0;
    for (const Cover cover : {Cover::kFull, Cover::kMixed}) {
      TGA_UNROLL
      for (int i = 0; i < kTilesPerLane; ++i) {
        const bool listed = covers[i] == cover;
        const uint32_t votes = dev::ballot(listed);
        if (listed) {
          const uint32_t before = dev::count_bits(votes & ((1u << lane) - 1));
          dev::store_shared(shared_ + kList + (count + before) * 4, static_cast<uint32_t>((i * 32 + lane) * kBlock));
        }
        count += dev::count_bits(votes);
      }
      if (lane == 0) {
        dev::store_shared(shared_ + kCounts + (cover == Cover::kFull ? 0 : 4), count);
      }
    }
  }

  uint32_t shared_;
  int full_ = 0, total_ = 0;
};

}  // namespace torch_gated_attn::cuda
