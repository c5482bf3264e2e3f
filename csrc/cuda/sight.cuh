// SPDX-License-Identifier: BSD-3-Clause
//
// Which pairs are attended to, the bias aside: by position and key length (visibility.h) and by the mask, for single pairs
// and for the tiles of a block.
#pragma once

#include "device.cuh"
#include "params.h"

namespace torch_gated_attn::cuda {

// What the queries of a batch row with `length` keys see.
template <class Int = int>
TGA_DEVICE Visibility<Int> visibility(const AttentionParams& p, int length) {
  Visibility<Int> v;
  v.q_len = p.q_len, v.k_len = p.k_len, v.length = length, v.window = p.window, v.causal = p.is_causal;
  return v;
}

// Keys of a batch row that exist.
TGA_DEVICE int key_length(const AttentionParams& p, const SlabIndex& slab, int64_t batch_row) {
  if (p.key_lengths.data == nullptr) {
    return p.k_len;
  }
  const int64_t length =
      dev::load_global<int64_t>(static_cast<const int64_t*>(p.key_lengths.data) + p.key_lengths.offset(slab, batch_row, 0));
  return length < 0 ? 0 : length < p.k_len ? static_cast<int>(length) : p.k_len;
}

// The mask of a batch row and head; null without.
TGA_DEVICE const uint8_t* mask_of(const AttentionParams& p, const SlabIndex& slab, int64_t batch_row, int head) {
  return p.mask.data == nullptr ? nullptr : static_cast<const uint8_t*>(p.mask.data) + p.mask.offset(slab, batch_row, head);
}

// Bits [begin - first, end - first) of 32.
TGA_DEVICE uint32_t bits_of(Range<int> range, int first) {
  const auto below = [](int n) { return n <= 0 ? 0u : n >= 32 ? 0xffffffffu : (1u << n) - 1; };
  return below(range.end - first) & ~below(range.begin - first);
}

// A mask that is none of keys, of a batch row and head; null where there is none.
struct PairMask {
  const uint8_t* data = nullptr;

  TGA_DEVICE bool attended(const AttentionParams& p, int query, int key) const {
    return dev::load_global<uint8_t>(data + query * p.mask.row + key * p.mask.col) != 0;
  }
};

// Which pairs of a tile a warp's rows attend to: a bit each in shared memory, written ahead of the scores, when registers
// are free, and read where a score is.
template <int kRows, int kWords>
class PairBits {
 public:
  static constexpr uint32_t kWarpBytes = kRows * kWords * 4;

  // `shared` is the block's, kWarpBytes to a warp.
  TGA_DEVICE explicit PairBits(uint32_t shared) : shared_(shared + dev::thread_index() / 32 * kWarpBytes) {}

  // Rows are queries. `keys`: those that the row of the plan attends to of the 32 from `first_key` on, which are `word`'s.
  TGA_DEVICE void write_queries(const AttentionParams& p, const PairMask& mask, int first_query, int first_key, int word,
                                uint32_t keys) const {
    const int lane = dev::thread_index() % 32, query = first_query + lane;
    uint32_t bits = query < p.q_len ? keys : 0;
    if (p.is_causal) {
      bits &= bits_of(visibility(p, p.k_len).keys_of(query), first_key);
    }
    // Rolled here and below: 32 loads in flight need 64 registers, which the accumulators hold.
    TGA_ROLLED
    for (int row = 0; mask.data != nullptr && row < kRows; ++row) {
      const uint32_t votes = dev::ballot((keys >> lane & 1) != 0 && first_query + row < p.q_len &&
                                         mask.attended(p, first_query + row, first_key + lane));
      bits &= row == lane ? votes : 0xffffffffu;
    }
    write(lane, word, bits);
  }

  // Rows are keys, of which `length` exist; bits are those of 32 queries.
  TGA_DEVICE void write_keys(const AttentionParams& p, const PairMask& mask, int first_key, int first_query, int word,
                             int length) const {
    const int lane = dev::thread_index() % 32, key = first_key + lane;
    uint32_t bits = bits_of(visibility(p, length).queries_of({key, key + 1}), first_query);
    TGA_ROLLED
    for (int i = 0; mask.data != nullptr && i < 32; ++i) {
      if ((bits >> i & 1) != 0 && !mask.attended(p, first_query + i, key)) {
        bits &= ~(1u << i);
      }
    }
    write(lane, word, bits);
  }

  // Before the first word of a tile is written, and after the last.
  TGA_DEVICE void sync() const { dev::sync_warp(); }

  // Where the words of a row begin.
  TGA_DEVICE uint32_t address(int row) const { return shared_ + row * kWords * 4; }
  // The bits of a row from a column of the tile on, to the end of its word.
  TGA_DEVICE uint32_t from(int row, int column) const {
    return dev::load_shared<uint32_t>(address(row) + column / 32 * 4) >> (column % 32);
  }

 private:
  TGA_DEVICE void write(int row, int word, uint32_t bits) const {
    if (row < kRows) {
      dev::store_shared(shared_ + (row * kWords + word) * 4, bits);
    }
  }

  uint32_t shared_;
};

// Of 32 keys, a bit each: those that some query of a range attends to, and those that all of them do.
struct KeyVotes {
  uint32_t some, all;
};

// What a range of queries of one head attends to, in neighbouring batch rows.
struct BlockSight {
  const AttentionParams& p;
  const SlabIndex& slab;
  int64_t first_row;
  Range<int> queries;
  const uint8_t* mask;  // of the first batch row; null without

  TGA_DEVICE BlockSight(const AttentionParams& p, const SlabIndex& slab, int64_t first_row, int head, int first_query,
                        int queries)
      : p(p),
        slab(slab),
        first_row(first_row),
        queries{first_query, first_query + queries < p.q_len ? first_query + queries : p.q_len},
        mask(mask_of(p, slab, first_row, head)) {}

  TGA_DEVICE bool mask_is_of_pairs() const { return mask != nullptr && p.mask.row != 0; }

  // The keys that some query sees in some of the batch rows.
  TGA_DEVICE Range<int> keys(int rows) const {
    int length = p.k_len;
    if (p.key_lengths.data != nullptr) {
      length = 0;
      for (int row = 0; row < rows; ++row) {
        const int other = key_length(p, slab, first_row + row);
        length = other > length ? other : length;
      }
    }
    return visibility(p, length).keys_of(queries);
  }

  // Of the keys from `first_key` on; called by whole warps.
  TGA_DEVICE KeyVotes vote(int row, int first_key) const {
    const int key = first_key + dev::thread_index() % 32;
    const Visibility<int> seen = visibility(p, key_length(p, slab, first_row + row));
    const Range<int> by_some = seen.keys_of(queries), by_all = seen.keys_of_all(queries);
    bool some = key >= by_some.begin && key < by_some.end, all = key >= by_all.begin && key < by_all.end;
    if (mask != nullptr) {
      const uint8_t* const column = mask + row * p.mask.batch_row + key * p.mask.col;
      if (p.mask.row == 0) {
        some = some && dev::load_global<uint8_t>(column) != 0;
        all = all && some;
      } else {
        ask_pairs(seen, column, key, some, all);
      }
    }
    return {dev::ballot(some), dev::ballot(all)};
  }

 private:
  // Asks the mask about a key and every query, until no lane's answer can change.
  TGA_DEVICE void ask_pairs(const Visibility<int>& seen, const uint8_t* column, int key, bool& some, bool& all) const {
    constexpr int kQueriesAtOnce = 8;  // loads in flight
    const bool possible = some;
    some = false;
    for (int first = queries.begin; first < queries.end; first += kQueriesAtOnce) {
      TGA_UNROLL
      for (int i = 0; i < kQueriesAtOnce; ++i) {
        const int query = first + i;
        if (possible && query < queries.end) {
          const bool attended = seen.sees(query, key) && dev::load_global<uint8_t>(column + query * p.mask.row) != 0;
          some = some || attended;
          all = all && attended;
        }
      }
      if (!dev::any(possible && (!some || all))) {
        break;
      }
    }
  }
};

}  // namespace torch_gated_attn::cuda
