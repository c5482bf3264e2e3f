// SPDX-License-Identifier: BSD-3-Clause
//
// Fused forward for bfloat16 and float16, and for float32 by TF32 products.
//
// A block owns kRows queries of one head for kGroup batch rows that share the bias, and walks the key tiles; each query,
// key, value and bias tile is read once per block, scores live in registers only. Inside a key tile the batch rows take
// turns on the bias fragments the threads hold. Outputs, sums and shifts stay in registers to the end.
#pragma once

#include "bias.cuh"
#include "gate.cuh"
#include "key_value_ring.cuh"
#include "softmax.cuh"

namespace torch_gated_attn::cuda {

template <class T>
struct ForwardBlock {
  using Plan = TilePlan<T::kGroup, T::kBlock, T::kThreads>;
  using Ring = KeyValueRing<T, Plan, 1, T::kThreads>;
  using Pairs = PairBits<16 * T::kRowTiles, T::kBlock / 32>;
  using Queries = PrivateFragments<T::kGroup * T::kRowTiles, T::kFragments, T::kThreads, T::kStationaryInShared>;
  static constexpr uint32_t kRingBytes = Ring::kBytes + Ring::Pointers::kBytes;
  static constexpr uint32_t kPairs = Plan::kBytes + kRingBytes + Queries::kBytes + Ring::Pointers::kBytes;  // come last
  static constexpr uint32_t kSharedBytes = kPairs + T::kWarps * Pairs::kWarpBytes;
};

// What a block works on.
struct ForwardPlace {
  SlabIndex slab;
  int64_t slab_number;
  int64_t first_row;      // of the slab's batch rows
  int head, first_query;  // of this warp
};

template <class T>
TGA_DEVICE ForwardPlace forward_place(const AttentionParams& p) {
  // Worked out anew for the stores, hence opaque: kept, it would fill a dozen registers through the main loop.
  int64_t index = p.first_block + dev::opaque(dev::block_index());
  const int query_tiles = (p.q_len + T::kRows - 1) / T::kRows;
  const int64_t groups = (p.batch.rows + T::kGroup - 1) / T::kGroup;
  ForwardPlace place;
  // Blocks that run side by side share keys and values first, the bias second.
  place.first_query = static_cast<int>(index % query_tiles) * T::kRows + dev::thread_index() / 32 * 16 * T::kRowTiles;
  index /= query_tiles;
  place.first_row = index % groups * T::kGroup;
  index /= groups;
  place.head = static_cast<int>(index % p.heads);
  place.slab_number = index / p.heads;
  place.slab = slab_index(p.batch, place.slab_number);
  return place;
}

// What the block's queries attend to.
template <class T>
TGA_DEVICE BlockSight forward_sight(const AttentionParams& p, const ForwardPlace& place) {
  return BlockSight(p, place.slab, place.first_row, place.head, place.first_query / T::kRows * T::kRows, T::kRows);
}

// Mean of all values of one batch row and head: what a fully masked row returns under masked_rows = "mean". Columns as in
// the accumulators; the lanes of equal `pair` share the keys.
template <class T>
TGA_DEVICE void mean_of_values(float (&mean)[T::kCols][2], const typename T::Element* value, const AttentionParams& p) {
  const Lane lane = this_lane();
  TGA_UNROLL
  for (int n = 0; n < T::kCols; ++n) {
    mean[n][0] = mean[n][1] = 0.0f;
  }
  for (int key = lane.row; key < p.k_len; key += 8) {
    TGA_UNROLL
    for (int n = 0; n < T::kCols; ++n) {
      const Float2 v =
          load_values<T::kType>(value + key * p.value.row, n * 8 + lane.pair * 2, p.value_dim, !T::kGeneral || p.aligned);
      mean[n][0] += v.x;
      mean[n][1] += v.y;
    }
  }
  TGA_UNROLL
  for (int n = 0; n < T::kCols; ++n) {
    TGA_UNROLL
    for (int e = 0; e < 2; ++e) {
      TGA_UNROLL
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        mean[n][e] += dev::shuffle_xor(mean[n][e], lanes);
      }
      mean[n][e] /= p.k_len;
    }
  }
}

// Divides by the sum, applies the gate, stores output, lse, shift and sum of one batch row.
template <class T>
TGA_DEVICE void store_row(const RowState<T>& state, const AttentionParams& p, const ForwardPlace& place, int64_t batch_row,
                          int first_query) {
  using Element = typename T::Element;
  const Lane lane = this_lane();
  const bool pairs_aligned = !T::kGeneral || p.aligned;
  Element* const out = static_cast<Element*>(p.out.data) + p.out.offset(place.slab, batch_row, place.head);
  const Element* const gate =
      p.gate.data == nullptr ? nullptr
                             : static_cast<const Element*>(p.gate.data) + p.gate.offset(place.slab, batch_row, place.head);
  TGA_UNROLL
  for (int m = 0; m < T::kRowTiles; ++m) {
    const float sums[2] = {state.total(m, 0), state.total(m, 1)};
    const bool empty[2] = {sums[0] == 0.0f, sums[1] == 0.0f};
    float mean[T::kCols][2];
    const bool use_mean = p.mean_rows && dev::any(empty[0] || empty[1]);
    if (use_mean) {
      mean_of_values<T>(mean,
                        static_cast<const Element*>(p.value.data) +
                            p.value.offset(place.slab, batch_row, place.head / (p.heads / p.kv_heads)),
                        p);
    }
    TGA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int query = first_query + m * 16 + lane.row + 8 * i;
      if (query >= p.q_len) {
        continue;
      }
      const float sum = sums[i], inverse = empty[i] ? 0.0f : dev::reciprocal(sum);
      if (lane.pair == 0) {
        const float shift = empty[i] ? 0.0f : state.shift[m][i];
        const auto store = [&](const Operand& to, float value) {
          dev::store_global(static_cast<float*>(to.data) + to.offset(place.slab, batch_row, place.head) + query * to.row,
                            value);
        };
        store(p.lse, empty[i] ? -INFINITY : (shift + dev::log2(sum)) * kLn2);
        store(p.row_max, shift);
        store(p.row_sum, sum);
      }
      TGA_UNROLL
      for (int n = 0; n < T::kCols; ++n) {
        const int col = n * 8 + lane.pair * 2;
        float x = state.acc[m][n][2 * i] * inverse, y = state.acc[m][n][2 * i + 1] * inverse;
        if (use_mean && empty[i]) {
          x = mean[n][0];
          y = mean[n][1];
        }
        if (gate != nullptr) {
          const Float2 g = load_gate<T::kType>(gate + query * p.gate.row, p.gate.col, col, p.value_dim, pairs_aligned);
          x *= sigmoid(g.x);
          y *= sigmoid(g.y);
        }
        store_pair<T::kType>(out + query * p.out.row, col, p.value_dim, pairs_aligned, x, y);
      }
    }
  }
}

// Scores of one batch row against a key tile, in the units softmax() multiplies by its factor.
template <class T>
TGA_DEVICE void score_tile(float (&score)[T::kRowTiles][T::kSubtiles][4], const typename ForwardBlock<T>::Queries& queries,
                           int r, const float (&bias)[T::kSubtiles][T::kRowTiles][4], uint32_t keys, float factor) {
  uint32_t query[T::kRowTiles][T::kFragments][4];
  TGA_UNROLL
  for (int m = 0; m < T::kRowTiles; ++m) {
    queries.get(r * T::kRowTiles + m, query[m]);
  }
  uint32_t b[(T::kSteps + 1) / 2][4];
  TGA_UNROLL
  for (int n = 0; n < T::kSubtiles; ++n) {
    if (n * 8 % kRowsPerLoad<T::kSteps> == 0) {
      load_rows_as_columns<T::kSteps, T::kRowBytes>(b, keys, n * 8);
    }
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      score_pairs<T>(score[m][n], query[m], b, n, bias[n][m], factor);
    }
  }
}

template <class T>
TGA_KERNEL(T::kThreads, 1)
forward_kernel(TGA_PARAMS AttentionParams p) {
  using Block = ForwardBlock<T>;
  using Element = typename T::Element;
  const ForwardPlace place = forward_place<T>(p);
  const Lane lane = this_lane();
  const int first_query = place.first_query;
  const int rows =
      p.batch.rows - place.first_row < T::kGroup ? static_cast<int>(p.batch.rows - place.first_row) : T::kGroup;
  const int kv_head = place.head / (p.heads / p.kv_heads);
  const float factor = score_factor<T>(p);

  RowState<T> state[T::kGroup];
  typename Block::Queries queries(dev::shared_base() + Block::Plan::kBytes + Block::kRingBytes);
  TGA_UNROLL
  for (int r = 0; r < T::kGroup; ++r) {
    const Element* data =
        static_cast<const Element*>(p.query.data) + p.query.offset(place.slab, place.first_row + r, place.head);
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      uint32_t query[T::kFragments][4];
      load_rows<T>(query, data, p.query.row, first_query + m * 16, r < rows ? p.q_len : 0, p.head_dim,
                   !T::kGeneral || p.aligned);
      if (!T::kLogits && p.scale < 0) {
        negate(query);
      }
      queries.put(r * T::kRowTiles + m, query);
    }
    state[r].clear();
  }

  typename Block::Plan plan(dev::shared_base());
  typename Block::Ring ring(p, dev::thread_index(), dev::shared_base() + Block::Plan::kBytes);
  ring.point_at(p, static_cast<const Element*>(p.key.data) + p.key.offset(place.slab, place.first_row, kv_head),
                static_cast<const Element*>(p.value.data) + p.value.offset(place.slab, place.first_row, kv_head));
  constexpr bool kFloatBias = T::kBias == BiasAccess::kFloat;
  FragmentBias<T> bias_rows(p.bias,
                            element(p.bias.data, p.bias.offset(place.slab, place.first_row, place.head), kFloatBias),
                            first_query, p.q_len, 1.0f / fabsf(p.scale),
                            dev::shared_base() + Block::Plan::kBytes + Block::kRingBytes + Block::Queries::kBytes);
  const GeneralBias<T::kType> general_bias(p, place.slab, place.first_row, place.head);
  // Worked out anew for every panel: kept, what it is made of would fill registers through the main loop.
  const auto with_sight = [&](auto use) {
    const ForwardPlace here = forward_place<T>(p);
    const int64_t left = p.batch.rows - here.first_row;
    return use(forward_sight<T>(p, here), left < T::kGroup ? static_cast<int>(left) : T::kGroup);
  };
  const auto keys_seen = [&] { return with_sight([](const BlockSight& sight, int rows) { return sight.keys(rows); }); };

  for (int panel = keys_seen().begin / T::kBlock * T::kBlock; panel < keys_seen().end; panel += Block::Plan::kPanel) {
    with_sight([&](const BlockSight& sight, int rows) { plan.build(sight, rows, panel, sight.keys(rows)); });
    ring.restart();
    // Step `step` of the copies counts batch rows within tiles; it is kStages - 1 steps ahead of the products.
    const auto issue = [&](int i, int step) {
      const int tile = i + step / T::kGroup, r = step % T::kGroup;
      if (tile < plan.total()) {
        if (r == 0) {
          ring.begin_tile(p, plan, panel, plan.key(tile), 0);
        } else {
          ring.next_batch_row(p);
        }
        ring.copy(p, ring.next_write());
      }
      dev::commit_copies();
    };
    TGA_UNROLL
    for (int step = 0; step < T::kStages - 1; ++step) {
      issue(0, step);
    }
    const auto visit = [&](int i, auto masked) {
      const uint32_t key = plan.key(i);
      float bias[T::kSubtiles][T::kRowTiles][4];
      bias_rows.begin_tile();
      if constexpr (T::kBiasFragments) {
        TGA_UNROLL
        for (int n = 0; n < T::kSubtiles; ++n) {
          bias_rows.template load<masked.value>(bias[n], panel + key, n * 8, p.k_len);
        }
      }
      TGA_UNROLL
      for (int r = 0; r < T::kGroup; ++r) {
        dev::wait_copies<T::kStages - 2>();
        dev::sync_block();
        issue(i, r + T::kStages - 1);
        const uint32_t keys = ring.next_read();
        if (masked.value && T::kGroup > 1 && plan.empty(r, key)) {
          continue;
        }
        if (dev::thread_index() == 0) {
          dev::count_tile(place.slab_number * p.batch.rows + place.first_row + r, place.head, first_query, T::kRows,
                          panel + key, T::kBlock, masked.value);
        }
        const typename Block::Pairs pairs(dev::shared_base() + Block::kPairs);
        if constexpr (masked.value) {
          pairs.sync();
          for (int word = 0; word < T::kBlock / 32; ++word) {
            pairs.write_queries(p, plan.pair_mask(p, r), first_query, panel + key + word * 32, word,
                                plan.bits(r, key, word * 32));
          }
          pairs.sync();
        }
        float score[T::kRowTiles][T::kSubtiles][4];
        score_tile<T>(score, queries, r, bias, keys, factor);
        if constexpr (masked.value) {
          TGA_UNROLL
          for (int n = 0; n < T::kSubtiles; ++n) {
            TGA_UNROLL
            for (int i = 0; i < 2 * T::kRowTiles; ++i) {
              const int row = lane.row + 8 * i;
              const uint32_t attended = pairs.from(row, n * 8) >> lane.pair * 2;
              TGA_UNROLL
              for (int e = 0; e < 2; ++e) {
                float& s = score[i / 2][n][i % 2 * 2 + e];
                s = visible_score<T>(s, attended >> e & 1, general_bias, p, first_query + row,
                                     panel + key + n * 8 + lane.pair * 2 + e);
              }
            }
          }
        }
        uint32_t probabilities[T::kSubtiles / 2][T::kRowTiles][T::kOperandWords];
        TGA_UNROLL
        for (int m = 0; m < T::kRowTiles; ++m) {
          state[r].softmax(m, score[m], factor, probabilities);
        }
        state[r].accumulate(probabilities, keys + T::kTileBytes);
      }
    };
    const int full = T::kGeneral ? 0 : plan.full();
    for (int i = 0; i < full; ++i) {
      visit(i, std::false_type());
    }
    for (int i = full; i < plan.total(); ++i) {
      visit(i, std::true_type());
    }
  }

  const ForwardPlace here = forward_place<T>(p);
  TGA_UNROLL
  for (int r = 0; r < T::kGroup; ++r) {
    if (here.first_row + r < p.batch.rows) {
      store_row<T>(state[r], p, here, here.first_row + r, here.first_query);
    }
  }
}

}  // namespace torch_gated_attn::cuda
