// SPDX-License-Identifier: BSD-3-Clause
//
// Ring of shared memory stages through which key and value tiles flow, kRows batch rows to a stage. Masked keys and keys
// past the end arrive as zeros, so nothing they hold can reach a result.
#pragma once

#include "tile_plan.cuh"

namespace torch_gated_attn::cuda {

template <class T, class Plan, int kRows, int kThreads>
class KeyValueRing {
  using Copy = TileCopy<T, kThreads>;

 public:
  static constexpr uint32_t kStageBytes = kRows * 2 * T::kTileBytes;
  static constexpr uint32_t kBytes = T::kStages * kStageBytes;
  using Pointers = PrivatePointers<kThreads, T::kStationaryInShared>;

  // `thread` counts within the threads that share this ring; stages are `stride` bytes apart.
  TGA_DEVICE KeyValueRing(const AttentionParams& p, int thread, uint32_t base, uint32_t stride = kStageBytes)
      : start_(base + kBytes),
        copy_(thread),
        base_(base),
        stride_(stride),
        key_bytes_(chunk_bytes<T>(copy_.chunk, p.head_dim)),
        value_bytes_(chunk_bytes<T>(copy_.chunk, p.value_dim)),
        key_bit_(key_bytes_ > 0 ? 1u << copy_.row % 32 : 0),
        value_bit_(value_bytes_ > 0 ? 1u << copy_.row % 32 : 0) {}

  // The batch row that tiles count from.
  TGA_DEVICE void point_at(const AttentionParams& p, const typename T::Element* key, const typename T::Element* value) {
    start_.put(key + copy_.row * p.key.row + copy_.chunk * T::kChunk,
               value + copy_.row * p.value.row + copy_.chunk * T::kChunk);
  }

  // The tile the next copies bring: the one that begins at `key` of the panel, of the first batch row.
  TGA_DEVICE void begin_tile(const AttentionParams& p, const Plan& plan, int panel, uint32_t key, int plan_row) {
    start_.get(tile_key_, tile_value_);
    tile_key_ += row_offset<T>(panel + key, p.key.row);
    tile_value_ += row_offset<T>(panel + key, p.value.row);
    tile_bits_ = plan.bits_address(plan_row, key) + (Copy::kRowsPerPass > 32 ? copy_.row / 32 * 4 : 0);
  }
  TGA_DEVICE void next_batch_row(const AttentionParams& p) {
    tile_key_ += p.key.batch_row * static_cast<int64_t>(sizeof(typename T::Element));
    tile_value_ += p.value.batch_row * static_cast<int64_t>(sizeof(typename T::Element));
    tile_bits_ += Plan::kPanelWords * 4;
  }

  TGA_DEVICE void copy(const AttentionParams& p, uint32_t stage) {
    constexpr int kStep = Copy::kRowsPerPass;
    const uint32_t to = stage + copy_.shared_offset;
    TGA_UNROLL
    for (int pass = 0; pass < Copy::kPasses; ++pass) {
      if (!copy_.has(pass)) {
        continue;
      }
      const uint32_t bits = dev::load_shared<uint32_t>(tile_bits_ + pass * kStep / 32 * 4) >> (pass * kStep % 32);
      const uint32_t at = to + pass * kStep * T::kRowBytes;
      copy_chunk<!T::kGeneral>(at, tile_key_ + row_offset<T>(pass * kStep, p.key.row), (bits & key_bit_) ? key_bytes_ : 0,
                               p.aligned);
      copy_chunk<!T::kGeneral>(at + T::kTileBytes, tile_value_ + row_offset<T>(pass * kStep, p.value.row),
                               (bits & value_bit_) ? value_bytes_ : 0, p.aligned);
    }
  }

  TGA_DEVICE void restart() { write_ = read_ = base_; }
  TGA_DEVICE uint32_t next_write() { return advance(write_); }
  TGA_DEVICE uint32_t next_read() { return advance(read_); }

 private:
  TGA_DEVICE uint32_t advance(uint32_t& position) {
    const uint32_t stage = position;
    position += stride_;
    if (position == base_ + T::kStages * stride_) {
      position = base_;
    }
    return stage;
  }

  Pointers start_;  // of this thread's chunks of the first key
  const Copy copy_;
  const uint32_t base_, stride_;
  const int key_bytes_, value_bytes_;
  const uint32_t key_bit_, value_bit_;  // this thread's row in a word of mask bits; 0 for a chunk past the row's end
  uint32_t write_ = 0, read_ = 0, tile_bits_ = 0;
  const char *tile_key_ = nullptr, *tile_value_ = nullptr;
};

}  // namespace torch_gated_attn::cuda
