// SPDX-License-Identifier: BSD-3-Clause
//
// Which query tiles a block that owns keys visits: runs of tiles in which one of its teams attends to something, and of
// each whether pairs have to be looked at. A panel of tiles at a time, a bit to each. All of it waits in shared memory,
// since the main loop of the kernel has no register to spare.
#pragma once

#include "fragments.cuh"
#include "sight.cuh"

namespace torch_gated_attn::cuda {

template <class T>
class QueryPlan {
  static constexpr int kWordTiles = 32;
  // Two words of tiles to a warp, the address of the mask to a team, and the length of its keys.
  static constexpr uint32_t kMasks = T::kTeams * T::kWarps * 8, kLengths = kMasks + T::kTeams * 8;

 public:
  static constexpr uint32_t kBytes = 256;
  static_assert(kLengths + T::kTeams * 4 <= kBytes, "a team more has to make room");

  TGA_DEVICE explicit QueryPlan(uint32_t shared) : shared_(shared) {}

  // Called by the whole block. `row`: the batch row of this thread's team, which need not exist.
  TGA_DEVICE void begin(const AttentionParams& p, const SlabIndex& slab, int64_t row) {
    if (dev::thread_index() % T::kThreads == 0) {
      const int length = row < p.batch.rows ? key_length(p, slab, row) : kNoRow;
      dev::store_shared(length_address(team()), static_cast<uint32_t>(length));
    }
    dev::sync_block();
  }

  // Keys of the team's row that exist.
  TGA_DEVICE int length() const {
    const int length = length_of(team());
    return length == kNoRow ? 0 : length;
  }

  // The query tiles that positions let see the keys of the block.
  static TGA_DEVICE Range<int> tiles(const AttentionParams& p, int first_key) {
    // 64 bits keep what is added to a key below the end of their range.
    const Range<int64_t> queries = visibility<int64_t>(p, p.k_len).queries_of({first_key, first_key + T::kRows});
    if (queries.empty()) {
      return {};
    }
    return {static_cast<int>(queries.begin / T::kBlock), static_cast<int>((queries.end + T::kBlock - 1) / T::kBlock)};
  }
  // Tiles to a panel: where all are alike one stands for all.
  static TGA_DEVICE int panel_tiles(const AttentionParams& p, int tiles) { return all_alike(p) ? tiles : kWordTiles; }

  // Of the panel that begins at tile `panel`, for one head and the block's keys from `first_key` on. Called by the whole
  // block.
  TGA_DEVICE void build(const AttentionParams& p, const SlabIndex& slab, int64_t row, int head, int first_key, int panel) {
    const int warp = dev::thread_index() % T::kThreads / 32;
    uint32_t some = 0, mixed = 0;
    for (int i = warp; i < (all_alike(p) ? 1 : kWordTiles); i += T::kWarps) {
      const Cover cover = length() == 0 ? Cover::kEmpty : cover_of(p, slab, row, head, first_key, (panel + i) * T::kBlock);
      some |= static_cast<uint32_t>(cover != Cover::kEmpty) << i;
      mixed |= static_cast<uint32_t>(cover == Cover::kMixed) << i;
    }
    dev::sync_block();  // the last panel's plan and tiles are no longer read
    if (dev::thread_index() % 32 == 0) {
      dev::store_shared(word(team(), warp), some);
      dev::store_shared(word(team(), warp) + 4, mixed);
    }
    if (dev::thread_index() % T::kThreads == 0) {
      const uint64_t mask = asks_pairs(p) && length() > 0 ? reinterpret_cast<uint64_t>(mask_of(p, slab, row, head)) : 0;
      dev::store_shared(mask_address(team()), static_cast<uint32_t>(mask));
      dev::store_shared(mask_address(team()) + 4, static_cast<uint32_t>(mask >> 32));
    }
    dev::sync_block();
  }

  // Of the tiles [tile, end) of a panel: the first to visit, the end of the run that begins at `tile`, and the first of
  // which pairs have to be looked at; or `end`.
  TGA_DEVICE int next(const AttentionParams& p, int panel, int tile, int end) const {
    return first_with(p, visited(), panel, tile, end);
  }
  TGA_DEVICE int run_end(const AttentionParams& p, int panel, int tile, int end) const {
    return first_with(p, ~visited(), panel, tile, end);
  }
  TGA_DEVICE int full_until(const AttentionParams& p, int panel, int tile, int end) const {
    uint32_t mixed = 0;
    for (int team = 0; team < T::kTeams; ++team) {
      // A team that attends to nothing of a tile is not to compute it.
      mixed |= length_of(team) == kNoRow ? 0 : words_of(team, 4) | ~words_of(team, 0);
    }
    return first_with(p, mixed, panel, tile, end);
  }
  // Whether this thread's team attends to something of a tile.
  TGA_DEVICE bool attends(const AttentionParams& p, int panel, int tile) const {
    return (words_of(team(), 0) >> (all_alike(p) ? 0 : tile - panel) & 1) != 0;
  }
  // The team's mask of pairs.
  TGA_DEVICE PairMask pair_mask() const {
    const uint32_t at = mask_address(team());
    const uint64_t low = dev::load_shared<uint32_t>(at), high = dev::load_shared<uint32_t>(at + 4);
    return {(low | high) == 0 ? nullptr : reinterpret_cast<const uint8_t*>(dev::global_pointer(high << 32 | low))};
  }

 private:
  static constexpr int kNoRow = -1;

  // Whether the mask is one of pairs: keys of a key/value head are rows of their own here, whatever query heads there are.
  static TGA_DEVICE bool asks_pairs(const AttentionParams& p) {
    return p.mask.data != nullptr && (p.mask.row != 0 || (p.mask.head != 0 && p.heads != p.kv_heads));
  }
  static TGA_DEVICE bool all_alike(const AttentionParams& p) { return !p.is_causal && !asks_pairs(p); }

  static TGA_DEVICE int team() { return dev::thread_index() / T::kThreads; }
  TGA_DEVICE uint32_t word(int team, int warp) const { return shared_ + (team * T::kWarps + warp) * 8; }
  TGA_DEVICE uint32_t mask_address(int team) const { return shared_ + kMasks + team * 8; }
  TGA_DEVICE uint32_t length_address(int team) const { return shared_ + kLengths + team * 4; }
  TGA_DEVICE int length_of(int team) const { return static_cast<int>(dev::load_shared<uint32_t>(length_address(team))); }
  TGA_DEVICE uint32_t words_of(int team, uint32_t offset) const {
    uint32_t bits = 0;
    for (int warp = 0; warp < T::kWarps; ++warp) {
      bits |= dev::load_shared<uint32_t>(word(team, warp) + offset);
    }
    return bits;
  }
  TGA_DEVICE uint32_t visited() const {
    uint32_t bits = 0;
    for (int team = 0; team < T::kTeams; ++team) {
      bits |= words_of(team, 0);
    }
    return bits;
  }
  static TGA_DEVICE int first_with(const AttentionParams& p, uint32_t bits, int panel, int tile, int end) {
    if (all_alike(p)) {
      return bits & 1 ? tile : end;
    }
    while (tile < end && (bits >> (tile - panel) & 1) == 0) {
      ++tile;
    }
    return tile;
  }

  // What the team's batch row attends to of a tile of queries and of the block's keys; called by whole warps. Keys that do
  // not exist, or that a mask of keys hides, are rows of their own, which no pair has to be looked at for.
  TGA_DEVICE Cover cover_of(const AttentionParams& p, const SlabIndex& slab, int64_t row, int head, int first_key,
                            int first_query) const {
    const BlockSight sight(p, slab, row, head, first_query, T::kBlock);
    const Range<int> keys = {first_key, first_key + T::kRows < length() ? first_key + T::kRows : length()};
    if (keys.empty() || sight.queries.empty()) {
      return Cover::kEmpty;
    }
    const Cover cover = visibility(p, length()).cover(sight.queries, keys);
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
    return !some ? Cover::kEmpty : asks_pairs(p) && !all ? Cover::kMixed : cover;
  }

  uint32_t shared_;
};

}  // namespace torch_gated_attn::cuda
