// SPDX-License-Identifier: BSD-3-Clause
//
// Tile shapes, the one place where they are chosen. A warp owns 16 * kRowTiles queries (or keys); kGroup batch rows share
// the bias fragments a thread holds.
#pragma once

#include <type_traits>

#include "params.h"

namespace torch_gated_attn::cuda {

constexpr int next_power_of_two(int x) { return x <= 16 ? 16 : x <= 32 ? 32 : x <= 64 ? 64 : 128; }

// What an operand is made of in memory.
template <DType kType>
using ElementOf = std::conditional_t<kType == DType::kFloat32, float, uint16_t>;

// Largest head_dim that the tensor-core kernels for float32 are compiled for: their registers end there.
constexpr int kMaxTf32HeadDim = 64;

// Derived sizes of a shape; shared by all kernels.
template <DType kType_, int kHeadDim_, BiasAccess kBias_, int kWarps_, int kRowTiles_, int kBlock_, int kGroup_,
          int kStages_, bool kStationaryInShared_ = false, bool kSplitStationary_ = true>
struct Tile {
  static constexpr DType kType = kType_;
  using Element = ElementOf<kType>;
  static constexpr bool kTf32 = kType == DType::kFloat32;  // operands are split into two TF32 parts (tf32.cuh)
  static constexpr BiasAccess kBias = kBias_;
  static constexpr bool kGeneral = kBias == BiasAccess::kGeneral;
  static constexpr bool kBiasFragments = kBias == BiasAccess::kHalf || kBias == BiasAccess::kFloat;
  static constexpr bool kLogits = kGeneral || kTf32;  // scores are logits before softmax() sees them
  static constexpr int kHeadDim = kHeadDim_, kWarps = kWarps_, kRowTiles = kRowTiles_, kBlock = kBlock_, kGroup = kGroup_,
                       kStages = kStages_;
  static constexpr bool kStationaryInShared = kStationaryInShared_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kWarps * kRowTiles * 16;  // rows of the stationary side
  static constexpr int kChunk = 16 / sizeof(Element);    // elements that are copied at once
  static constexpr int kSteps = kHeadDim / 2 / kChunk;   // k steps of a product over head_dim
  static constexpr int kCols = kHeadDim / 8;             // 8-wide column tiles of an accumulator
  static constexpr int kSubtiles = kBlock / 8;           // 8-wide column tiles of a score tile
  // Fragments of 16 rows of a stationary operand: the parts of float32 apart where registers allow.
  static constexpr int kFragments = kTf32 && kSplitStationary_ ? 2 * kSteps : kSteps;
  static constexpr int kOperandWords = kTf32 ? 8 : 4;  // a thread's share of 16 x 16 values as A operands
  // Rows of shared memory are a power of two long: the swizzle then spreads any 8 of them over all banks. Those of
  // float32 are at least 128 bytes, so that it also spreads every other one (accumulate_tf32).
  static constexpr uint32_t kRowBytes =
      kTf32 && kHeadDim < 32 ? 128 : next_power_of_two(kHeadDim) * static_cast<uint32_t>(sizeof(Element));
  static constexpr uint32_t kTileBytes = kBlock * kRowBytes;
};

// Batch rows that share the bias in a block of the forward.
constexpr int forward_group(int head_dim) { return head_dim <= 16 ? 4 : head_dim <= 32 ? 3 : head_dim <= 64 ? 2 : 1; }

// Forward. Without spills at head_dim <= 64 (benchmarks/sass_report.py holds the budgets): registers, not shared memory,
// limit kGroup and kRowTiles. `kShareBias`: several batch rows per block.
template <DType kType, int kHeadDim, BiasAccess kBias, bool kShareBias>
struct ForwardShape {
  static constexpr bool kGeneral = kBias == BiasAccess::kGeneral;
  static constexpr int kGroup = kShareBias ? forward_group(kHeadDim) : 1;
  static constexpr int kRowTiles = kGeneral || kHeadDim > 32 || kShareBias ? 1 : 2;
  static constexpr int kBlock = kHeadDim <= 64 && !kGeneral && kType != DType::kFloat32 ? 64 : 32;
  static constexpr int kWarps = kGroup >= 3 ? 8 : 4;
  using type = Tile<kType, kHeadDim, kBias, kWarps, kRowTiles, kBlock, kGroup, 3, (kGroup > 1)>;
};
template <DType kType, int kHeadDim, BiasAccess kBias, bool kShareBias>
using ForwardTile = typename ForwardShape<kType, kHeadDim, kBias, kShareBias>::type;

// Backward, query-stationary (dQ, dBias): kTeams teams of warps take different batch rows of the same queries and share one
// strip of dBias. `kStrip`: dBias is wanted and the strip fits shared memory.
template <DType kType, int kHeadDim, BiasAccess kBias, bool kStrip_>
struct QueryShape {
  static constexpr bool kGeneral = kBias == BiasAccess::kGeneral;
  static constexpr bool kTf32 = kType == DType::kFloat32;
  // 32 queries to a warp halve the traffic of shared memory. head_dim 32 then has no registers left for a second batch row,
  // and in float32, whose fragments are four times as large, none for 32 queries.
  static constexpr bool kWide = kHeadDim <= (kTf32 ? 16 : 32) && !kGeneral;
  static constexpr int kRowTiles = kWide ? 2 : 1;
  static constexpr int kGroup = kHeadDim <= 16 && kStrip_ && !kTf32 ? 2 : 1;
  // Floats take shorter tiles: those of all teams, 32 KiB, are to stay in L1 until the last team has read them.
  static constexpr int kBlock = kHeadDim == 32 && kStrip_ && kBias != BiasAccess::kFloat ? 64 : 32;
  // With a strip 64 queries to a block, which leaves room for 640 keys on sm_90 and 384 on sm_80; teams make up for the
  // warps.
  static constexpr int kTeams = !kStrip_ ? 1 : kWide ? 4 : 2;
  static constexpr int kTeamWarps = kStrip_ && kWide ? 2 : 4;
  struct type : Tile<kType, kHeadDim, kBias, kTeamWarps, kRowTiles, kBlock, kGroup, 2, false, kHeadDim <= 32> {
    static constexpr int kTeams = QueryShape::kTeams;
    static constexpr bool kStrip = kStrip_;
    static constexpr int kBlockThreads = kTeams * kTeamWarps * 32;  // kThreads are a team's
  };
};
template <DType kType, int kHeadDim, BiasAccess kBias, bool kStrip>
using QueryTile = typename QueryShape<kType, kHeadDim, kBias, kStrip>::type;

// Backward, key-stationary (dK, dV): teams take different batch rows, so that they meet the same bias in L1.
template <DType kType, int kHeadDim, BiasAccess kBias>
struct KeyShape {
  static constexpr bool kGeneral = kBias == BiasAccess::kGeneral;
  static constexpr bool kTf32 = kType == DType::kFloat32;
  static constexpr int kTeams = kGeneral || kHeadDim > 64 ? 1 : 2;
  static constexpr int kRowTiles = kHeadDim <= 32 && !kGeneral && !kTf32 ? 2 : 1;
  static constexpr int kBlock =
      kGeneral || kTf32 || kHeadDim > 64 || (kHeadDim == 32 && kBias == BiasAccess::kNone) ? 32 : 64;
  struct type : Tile<kType, kHeadDim, kBias, 4, kRowTiles, kBlock, 1, 2, false, kHeadDim <= 32> {
    static constexpr int kTeams = KeyShape::kTeams;
    static constexpr int kBlockThreads = 128 * kTeams;
  };
};
template <DType kType, int kHeadDim, BiasAccess kBias>
using KeyTile = typename KeyShape<kType, kHeadDim, kBias>::type;

// Backward, bias-stationary (dBias where no strip fits).
template <DType kType, int kHeadDim, BiasAccess kBias>
using BiasTile = Tile<kType, kHeadDim, kBias, 4, 1, (kHeadDim <= 16 && kType != DType::kFloat32 ? 64 : 32), 1, 2, false,
                      (kHeadDim <= 32)>;

}  // namespace torch_gated_attn::cuda
