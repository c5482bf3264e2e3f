// SPDX-License-Identifier: BSD-3-Clause
//
// Which query tiles a block that owns keys visits: runs of tiles in which one of its teams attends to something, and of
// each whether pairs have to be looked at. A panel of tiles at a time, a bit to each.
#pragma once

#include "fragments.cuh"
#include "sight.cuh"

namespace torch_gated_attn::cuda {

template <class T>
class QueryPlan {
 public:
  static constexpr uint32_t kBytes = 256;

  // `row`: the batch row of this thread's team, which need not exist; the block's keys begin at `first_key`.
  TGA_DEVICE QueryPlan(const AttentionParams& p, const SlabIndex& slab, int64_t row, int first_key, uint32_t shared)
      : shared_(shared),
        first_key_(first_key),
        length_(row < p.batch.rows ? key_length(p, slab, row) : 0),
        asks_pairs_(p.mask.data != nullptr && (p.mask.row != 0 || (p.mask.head != 0 && p.heads != p.kv_heads))),
        all_alike_(!p.is_causal && !asks_pairs_) {}

  TGA_DEVICE int length() const { return length_; }
  // Whether the mask is the same for all queries of a key, heads included.
  TGA_DEVICE bool asks_pairs() const { return asks_pairs_; }

  // The query tiles that some team's positions reach; called by the whole block.
  TGA_DEVICE Range<int> tiles(const AttentionParams& p) const {
    const Visibility<int64_t> seen = visibility<int64_t>(p, p.k_len);
    const Range<int64_t> queries = seen.queries_of({first_key_, first_key_ + T::kRows});
    if (queries.empty()) {
      return {};
    }
    return {static_cast<int>(queries.begin / T::kBlock), static_cast<int>((queries.end + T::kBlock - 1) / T::kBlock)};
  }
  // Tiles to a panel: where all are alike one stands for all.
  TGA_DEVICE int panel_tiles(int tiles) const { return all_alike_ ? tiles : kWordTiles; }

  // Of the panel that begins at tile `panel`, for one head. Called by the whole block.
  TGA_DEVICE void build(const AttentionParams& p, const SlabIndex& slab, int64_t row, int head, int panel) {
    const int team = dev::thread_index() / T::kThreads, warp = dev::thread_index() % T::kThreads / 32;
    uint32_t some = 0, mixed = 0;
    for (int i = warp; i < (all_alike_ ? 1 : kWordTiles); i += T::kWarps) {
      const Cover cover = length_ == 0 ? Cover::kEmpty : cover_of(p, slab, row, head, (panel + i) * T::kBlock);
      some |= static_cast<uint32_t>(cover != Cover::kEmpty) << i;
      mixed |= static_cast<uint32_t>(cover == Cover::kMixed) << i;
    }
    dev::sync_block();  // the last panel's plan and tiles are no longer read
    if (dev::thread_index() % 32 == 0) {
      dev::store_shared(word(team, warp), some);
      dev::store_shared(word(team, warp) + 4, mixed);
    }
    if (dev::thread_index() % T::kThreads == 0) {
      const uint64_t mask = asks_pairs_ && row < p.batch.rows ? reinterpret_cast<uint64_t>(mask_of(p, slab, row, head)) : 0;
      dev::store_shared(mask_address(team), static_cast<uint32_t>(mask));
      dev::store_shared(mask_address(team) + 4, static_cast<uint32_t>(mask >> 32));
    }
    dev::sync_block();
    panel_ = panel;
    visited_ = mixed_ = mine_ = 0;
    uint32_t idle = 0;
    for (int other = 0; other < T::kTeams; ++other) {
      uint32_t of_team = 0;
      for (int w = 0; w < T::kWarps; ++w) {
        of_team |= dev::load_shared<uint32_t>(word(other, w));
        mixed_ |= dev::load_shared<uint32_t>(word(other, w) + 4);
      }
      visited_ |= of_team;
      idle |= row + other - team < p.batch.rows ? ~of_team : 0u;
      mine_ = other == team ? of_team : mine_;
    }
    mixed_ |= idle;
  }

  // The first tile to visit from `tile` on, at most `end`; where its run ends; where, within that, a pair is hidden first.
  TGA_DEVICE int next(int tile, int end) const { return first_with(visited_, tile, end); }
  TGA_DEVICE int run_end(int tile, int end) const { return first_with(~visited_, tile, end); }
  TGA_DEVICE int full_until(int tile, int end) const { return first_with(mixed_, tile, end); }
  // Whether this thread's team attends to something in a tile.
  TGA_DEVICE bool attends(int tile) const { return (mine_ >> place(tile) & 1) != 0; }
  // The team's mask of pairs, which waits in shared memory, not in registers.
  TGA_DEVICE PairMask pair_mask() const {
    const uint32_t at = mask_address(dev::thread_index() / T::kThreads);
    const uint64_t low = dev::load_shared<uint32_t>(at), high = dev::load_shared<uint32_t>(at + 4);
    return {(low | high) == 0 ? nullptr : reinterpret_cast<const uint8_t*>(dev::global_pointer(high << 32 | low))};
  }

 private:
  static constexpr int kWordTiles = 32;

  TGA_DEVICE uint32_t word(int team, int warp) const { return shared_ + (team * T::kWarps + warp) * 8; }
  TGA_DEVICE uint32_t mask_address(int team) const { return shared_ + (T::kTeams * T::kWarps + team) * 8; }
  TGA_DEVICE int place(int tile) const { return all_alike_ ? 0 : tile - panel_; }

  TGA_DEVICE int first_with(uint32_t bits, int tile, int end) const {
    if (all_alike_) {
      return bits & 1 ? tile : end;
    }
    while (tile < end && (bits >> (tile - panel_) & 1) == 0) {
      ++tile;
    }
    return tile;
  }

  // What the team's batch row attends to of a tile of queries and of the block's keys; called by whole warps. Keys that do
  // not exist, or that a mask of keys hides, are rows of their own, which are no pairs' business.
  TGA_DEVICE Cover cover_of(const AttentionParams& p, const SlabIndex& slab, int64_t row, int head, int first_query) const {
    const BlockSight sight(p, slab, row, head, first_query, T::kBlock);
    const Range<int> keys = {first_key_, first_key_ + T::kRows < length_ ? first_key_ + T::kRows : length_};
    if (keys.empty() || sight.queries.empty()) {
      return Cover::kEmpty;
    }
    const Cover cover = visibility<int>(p, length_).cover(sight.queries, keys);
    if (cover == Cover::kEmpty || sight.mask == nullptr) {
      return cover;
    }
    bool some = false, all = true;
    for (int first = keys.begin; first < keys.end; first += 32) {
      const KeyVotes votes = sight.vote(0, first);
      const uint32_t exist = keys.end - first < 32 ? (1u << (keys.end - first)) - 1 : 0xffffffffu;
      some = some || votes.some != 0;
      all = all && (votes.all & exist) == exist;
    }
    return !some ? Cover::kEmpty : asks_pairs_ && !all ? Cover::kMixed : cover;
  }

  uint32_t shared_;
  int first_key_, length_;
  bool asks_pairs_, all_alike_;
  int panel_ = 0;
  uint32_t visited_ = 0, mixed_ = 0, mine_ = 0;
};

}  // namespace torch_gated_attn::cuda
