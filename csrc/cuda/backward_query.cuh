// SPDX-License-Identifier: BSD-3-Clause
//
// Backward, query-stationary: dQ, and dBias summed over batch rows.
//
// A block owns kRows queries of one head and walks a chunk of batch rows, kTeams * kGroup at a time: each team of warps
// keeps queries, dO and dQ of kGroup batch rows in registers while key and value tiles flow by. Within a 16-key piece of a
// tile the batch rows take turns on the bias fragments, and their dS is summed in registers. Over the whole chunk dBias is
// kept in a strip of shared memory in fragment order, which each lane only shares with its namesakes of the other teams:
// the teams walk the tiles one behind the other, so that between two barriers no two of them touch the same part, and the
// bias a team reads is in L1 for the next. The order is fixed by the shapes, no atomics: the sums are the same bits in
// every run.
#pragma once

#include "key_value_ring.cuh"
#include "reordered_bias.cuh"
#include "scores_backward.cuh"

namespace torch_gated_attn::cuda {

template <class T>
struct QueryBlock {
  // A strip of more keys than this fits no shared memory, so one panel holds them all.
  static constexpr int kLongestStrip = 1024;
  using Plan = TilePlan<T::kTeams * T::kGroup, T::kBlock, T::kBlockThreads, T::kStrip ? kLongestStrip : kLongestPanel>;
  using Pairs = PairBits<16 * T::kRowTiles, T::kBlock / 32>;  // for each batch row of a team
  using Ring = KeyValueRing<T, Plan, T::kGroup, T::kThreads>;
  static constexpr uint32_t kStageBytes = T::kTeams * Ring::kStageBytes;
  static constexpr uint32_t kPairBytes = T::kBlockThreads / 32 * Pairs::kWarpBytes;
  static constexpr uint32_t kRing = Plan::kBytes + T::kGroup * kPairBytes;
  static constexpr uint32_t kFixedBytes = kRing + T::kStages * kStageBytes;

  static int64_t strip_bytes(int k_len) {
    return T::kStrip ? int64_t{T::kRows} * ((k_len + T::kBlock - 1) / T::kBlock * T::kBlock) * 4 : 0;
  }
  static int64_t shared_bytes(int k_len) { return kFixedBytes + strip_bytes(k_len); }
};

// One batch row's part of a team's registers.
template <class T>
struct QueryState {
  uint32_t query[T::kRowTiles][T::kFragments][4], grad[T::kRowTiles][T::kFragments][4];
  float d_query[T::kRowTiles][T::kCols][4];
  float shift[T::kRowTiles][2], negative_delta[T::kRowTiles][4];

  TGA_DEVICE void load(const BackwardParams& p, const SlabIndex& slab, int64_t slab_number, int64_t batch_row, int head,
                       int first_query, bool exists) {
    const int64_t entry = scratch_entry(p, slab_number, exists ? batch_row : 0, head);
    const float* terms = p.row_terms + entry * p.q_padded * 4;
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      const int first = first_query + m * 16;
      load_rows<T>(query[m], operand_rows<T>(p.query, slab, batch_row, head), p.query.row, first, exists ? p.q_len : 0,
                   p.head_dim, !T::kGeneral || p.aligned);
      load_rows<T>(grad[m], core_grad_rows<T>(p, entry, 0), T::kHeadDim, first, exists ? p.q_padded : 0, T::kHeadDim, true);
      if (!T::kLogits && p.scale < 0) {
        negate(query[m]);
      }
      TGA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const RowTerms row = load_row_terms(terms, first + this_lane().row + 8 * i);
        shift[m][i] = exists ? row.shift : INFINITY;
        negative_delta[m][2 * i] = negative_delta[m][2 * i + 1] = exists ? row.negative_delta : 0.0f;
      }
      TGA_UNROLL
      for (int n = 0; n < T::kCols; ++n) {
        TGA_UNROLL
        for (int i = 0; i < 4; ++i) {
          d_query[m][n][i] = 0.0f;
        }
      }
    }
  }

  TGA_DEVICE bool has_low_row() const {
    bool low = false;
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      low |= is_low_row(shift[m][0]) || is_low_row(shift[m][1]);
    }
    return low;
  }

  TGA_DEVICE void store(const BackwardParams& p, const SlabIndex& slab, int64_t batch_row, int head,
                        int first_query) const {
    const Lane lane = this_lane();
    typename T::Element* const out =
        static_cast<typename T::Element*>(p.d_query.data) + p.d_query.offset(slab, batch_row, head);
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      TGA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int q = first_query + m * 16 + lane.row + 8 * i;
        if (q >= p.q_len) {
          continue;
        }
        TGA_UNROLL
        for (int n = 0; n < T::kCols; ++n) {
          store_pair<T::kType>(out + q * p.d_query.row, n * 8 + lane.pair * 2, p.head_dim, !T::kGeneral || p.aligned,
                               d_query[m][n][2 * i] * p.scale, d_query[m][n][2 * i + 1] * p.scale);
        }
      }
    }
  }
};

// What a block works on.
struct QueryPlace {
  int64_t slab_number, chunk, first_row, end_row;
  SlabIndex slab;
  int head, first_query;
};

template <class T>
TGA_DEVICE QueryPlace query_place(const BackwardParams& p) {
  // Worked out anew wherever it is needed, hence opaque: kept, it would fill twenty registers through the main loop.
  int64_t index = p.first_block + dev::opaque(dev::block_index());
  const int query_tiles = (p.q_len + T::kRows - 1) / T::kRows;
  QueryPlace place;
  place.first_query =
      static_cast<int>(index % query_tiles) * T::kRows + dev::thread_index() % T::kThreads / 32 * 16 * T::kRowTiles;
  index /= query_tiles;
  place.chunk = index % p.chunks;
  index /= p.chunks;
  place.head = static_cast<int>(index % p.heads);
  place.slab_number = index / p.heads;
  place.slab = slab_index(p.batch, place.slab_number);
  place.first_row = place.chunk * p.rows_per_chunk;
  place.end_row = place.first_row + p.rows_per_chunk < p.batch.rows ? place.first_row + p.rows_per_chunk : p.batch.rows;
  return place;
}

// What the block's queries attend to in the batch rows from `row` on.
template <class T>
TGA_DEVICE BlockSight query_sight(const BackwardParams& p, const QueryPlace& place, int64_t row) {
  return BlockSight(p, place.slab, row, place.head, place.first_query / T::kRows * T::kRows, T::kRows);
}

// The bias of the block's head as C operands: in place where it is float32, from the reordered copy where it is 16-bit.
template <class T>
struct QueryBias {
  using type = std::conditional_t<T::kBias == BiasAccess::kHalf, BiasAlongKeys<T>, FragmentBias<T>>;
  static TGA_DEVICE type make(const BackwardParams& p, const QueryPlace& place) {
    if constexpr (T::kBias == BiasAccess::kHalf) {
      return BiasAlongKeys<T>(p, bias_entry(p, place.slab_number, place.head), place.first_query);
    } else {
      return type(p.bias, element(p.bias.data, p.bias.offset(place.slab, 0, place.head), true), place.first_query, p.q_len,
                  1.0f / fabsf(p.scale));
    }
  }
};

template <class T>
TGA_KERNEL(T::kBlockThreads, 1)
backward_query_kernel(TGA_PARAMS BackwardParams p) {
  using Block = QueryBlock<T>;
  constexpr int kRowsAtOnce = T::kTeams * T::kGroup;
  const Lane lane = this_lane();
  const int team = dev::thread_index() / T::kThreads, thread = dev::thread_index() % T::kThreads, warp = thread / 32;
  const float factor = score_factor<T>(p);

  const uint32_t ring_base = dev::shared_base() + Block::kRing;
  typename Block::Plan plan(dev::shared_base());
  typename Block::Ring ring(p, thread, ring_base + team * Block::Ring::kStageBytes, Block::kStageBytes);
  const int strip_tiles = (p.k_len + T::kBlock - 1) / T::kBlock * T::kSubtiles;
  const uint32_t strip =
      ring_base + T::kStages * Block::kStageBytes + warp * T::kRowTiles * strip_tiles * 512 + lane.index * 16;
  if (T::kStrip && team == 0) {
    for (int n = 0; n < T::kRowTiles * strip_tiles; ++n) {
      dev::store_shared(strip + n * 512, Float4{0.0f, 0.0f, 0.0f, 0.0f});
    }
  }
  auto bias_source = QueryBias<T>::make(p, query_place<T>(p));

  const int groups =
      static_cast<int>((query_place<T>(p).end_row - query_place<T>(p).first_row + kRowsAtOnce - 1) / kRowsAtOnce);
  for (int group = 0; group < groups; ++group) {
    const QueryPlace place = query_place<T>(p);
    const int64_t group_row = place.first_row + static_cast<int64_t>(group) * kRowsAtOnce,
                  team_row = group_row + team * T::kGroup;
    const int rows = place.end_row - group_row < kRowsAtOnce ? static_cast<int>(place.end_row - group_row) : kRowsAtOnce;
    const int head = place.head, kv_head = head / (p.heads / p.kv_heads), first_query = place.first_query;
    QueryState<T> state[T::kGroup];
    TGA_UNROLL
    for (int r = 0; r < T::kGroup; ++r) {
      state[r].load(p, place.slab, place.slab_number, team_row + r, head, first_query, team * T::kGroup + r < rows);
    }
    bool low = false;
    if constexpr (!T::kTf32) {
      TGA_UNROLL
      for (int r = 0; r < T::kGroup; ++r) {
        low |= state[r].has_low_row();
      }
      low = dev::sync_block_any(low);
    }
    ring.point_at(p, operand_rows<T>(p.key, place.slab, team_row, kv_head),
                  operand_rows<T>(p.value, place.slab, team_row, kv_head));
    const GeneralBias<T::kType> general_bias(p, place.slab, team_row, head);
    const Range<int> keys_seen = query_sight<T>(p, place, group_row).keys(rows);

    // A strip only fits shared memory where all keys are one panel.
    for (int panel = T::kStrip ? 0 : keys_seen.begin / T::kBlock * T::kBlock; panel < (T::kStrip ? 1 : keys_seen.end);
         panel += Block::Plan::kPanel) {
      const QueryPlace same = query_place<T>(p);
      plan.build(query_sight<T>(p, same, same.first_row + static_cast<int64_t>(group) * kRowsAtOnce), rows, panel,
                 keys_seen);
      ring.restart();
      // Steps over the full tiles, then over the mixed ones, every team one tile ahead of the last. So that no two teams
      // meet at a tile of the strip, there are as many steps as teams at least, some of them idle. Full tiles are taken
      // for mixed ones where they are too few for that, or where a row is low.
      const int full = T::kGeneral || low || plan.full() < T::kTeams ? 0 : plan.full(), mixed = plan.total() - full;
      const int steps = full + (T::kStrip && mixed > 0 && mixed < T::kTeams ? T::kTeams : mixed);
      constexpr uint32_t kIdle = 0xffffffffu;
      int turn = T::kStrip ? team : 0;
      // First key of the tile this team visits at a step; called for one step after the other.
      const auto next_key = [&](int step) {
        if (step == full) {
          turn = full + (T::kStrip ? team : 0);
        }
        const uint32_t key = turn < plan.total() ? plan.key(turn) : kIdle;
        ++turn;
        if (T::kStrip && turn == (step < full ? full : steps)) {
          turn = step < full ? 0 : full;
        }
        return key;
      };
      uint32_t upcoming = kIdle;
      const auto issue = [&](int step) {
        upcoming = step < steps ? next_key(step) : kIdle;
        const uint32_t stage = ring.next_write();
        if (upcoming != kIdle) {
          ring.begin_tile(p, plan, panel, upcoming, team * T::kGroup);
          TGA_UNROLL
          for (int r = 0; r < T::kGroup; ++r) {
            ring.copy(p, stage + r * 2 * T::kTileBytes);
            ring.next_batch_row(p);
          }
        }
        dev::commit_copies();
      };
      static_assert(T::kStages == 2, "one tile is in flight while one is read: `upcoming` is that one");
      issue(0);
      const auto visit = [&](int step, auto masked) {
        dev::wait_copies<0>();
        dev::sync_block();
        const uint32_t key = upcoming;
        issue(step + 1);
        const uint32_t stage = ring.next_read();
        if (masked.value && key == kIdle) {
          return;
        }
        // Batch rows that attend to nothing of the tile.
        bool idle[T::kGroup], all_idle = true;
        TGA_UNROLL
        for (int r = 0; r < T::kGroup; ++r) {
          idle[r] = masked.value && plan.empty(team * T::kGroup + r, key);
          all_idle = all_idle && idle[r];
        }
        if (all_idle) {
          return;
        }
        if (thread == 0) {
          for (int r = 0; r < T::kGroup; ++r) {
            if (team * T::kGroup + r < rows && !idle[r]) {
              dev::count_tile(place.slab_number * p.batch.rows + team_row + r, head, first_query, T::kRows, panel + key,
                              T::kBlock, masked.value);
            }
          }
        }
        const auto pairs = [&](int r) {
          return typename Block::Pairs(dev::shared_base() + Block::Plan::kBytes + r * Block::kPairBytes);
        };
        if constexpr (masked.value) {
          dev::sync_warp();
          TGA_UNROLL
          for (int r = 0; r < T::kGroup; ++r) {
            TGA_ROLLED
            for (int word = 0; word < T::kBlock / 32; ++word) {
              const int row = team * T::kGroup + r;
              pairs(r).write_queries(p, plan.pair_mask(p, row), first_query, panel + key + word * 32, word,
                                     plan.bits(row, key, word * 32));
            }
          }
          dev::sync_warp();
        }
        const uint32_t strip_tile = strip + key / 8 * 512;
        if constexpr (T::kBias == BiasAccess::kHalf) {
          bias_source.begin_tile(panel + key);
        }
        TGA_UNROLL
        for (int j = 0; j < T::kBlock / 16; ++j) {
          // The branch also keeps the compiler from running two rounds side by side, for which float32 has no registers.
          if (T::kTf32 && panel + static_cast<int>(key) + j * 16 >= p.k_len) {
            break;
          }
          uint32_t d_score[T::kGroup][T::kRowTiles][T::kOperandWords];
          uint32_t key_rows[T::kGroup][(T::kSteps + 1) / 2][4], value_rows[T::kGroup][(T::kSteps + 1) / 2][4];
          [[maybe_unused]] uint32_t bias_words[T::kRowTiles][4];
          if constexpr (T::kBias == BiasAccess::kHalf) {
            bias_source.load(bias_words, j);
          }
          TGA_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int first = j * 16 + e * 8;  // of the 8 keys at hand, within the tile
            [[maybe_unused]] float bias[T::kRowTiles][4], d_bias[T::kRowTiles][4];
            if constexpr (T::kBias == BiasAccess::kHalf) {
              bias_source.operand(bias, bias_words, e);
            } else if constexpr (T::kBias == BiasAccess::kFloat) {
              bias_source.template load<masked.value>(bias, panel + key, first, p.k_len);
            }
            TGA_UNROLL
            for (int m = 0; T::kStrip && m < T::kRowTiles; ++m) {
              const Float4 sum = dev::load_shared<Float4>(strip_tile + (m * strip_tiles + first / 8) * 512);
              d_bias[m][0] = sum.x;
              d_bias[m][1] = sum.y;
              d_bias[m][2] = sum.z;
              d_bias[m][3] = sum.w;
            }
            TGA_UNROLL
            for (int r = 0; r < T::kGroup; ++r) {
              const uint32_t keys = stage + r * 2 * T::kTileBytes, values = keys + T::kTileBytes;
              if (idle[r]) {
                continue;
              }
              float score[T::kRowTiles][4], d_prob[T::kRowTiles][4];
              if (first % kRowsPerLoad<T::kSteps> == 0) {
                load_rows_as_columns<T::kSteps, T::kRowBytes>(key_rows[r], keys, first);
                load_rows_as_columns<T::kSteps, T::kRowBytes>(value_rows[r], values, first);
              }
              TGA_UNROLL
              for (int m = 0; m < T::kRowTiles; ++m) {
                score_pairs<T>(score[m], state[r].query[m], key_rows[r], e, bias[m], factor);
              }
              TGA_UNROLL
              for (int m = 0; m < T::kRowTiles; ++m) {
                multiply<T>(d_prob[m], state[r].grad[m], value_rows[r], e, state[r].negative_delta[m]);
              }
              TGA_UNROLL
              for (int m = 0; m < T::kRowTiles; ++m) {
                float d[4];
                uint32_t attended[2] = {};
                if constexpr (masked.value) {
                  attended[0] = pairs(r).from(m * 16 + lane.row, first) >> lane.pair * 2;
                  attended[1] = pairs(r).from(m * 16 + lane.row + 8, first) >> lane.pair * 2;
                }
                TGA_UNROLL
                for (int i = 0; i < 4; ++i) {
                  float s = score[m][i];
                  if constexpr (masked.value) {
                    s = visible_score<T>(s, attended[i / 2] >> (i % 2) & 1, general_bias, p,
                                         first_query + m * 16 + lane.row + i / 2 * 8,
                                         panel + key + first + lane.pair * 2 + i % 2);
                  }
                  d[i] = score_grad<masked.value>(probability<T, masked.value>(s, factor, state[r].shift[m][i / 2]),
                                                  d_prob[m][i]);
                  if constexpr (T::kStrip) {
                    d_bias[m][i] += d[i];
                  }
                }
                put_operand<T>(d_score[r][m], e, d);
              }
            }
            TGA_UNROLL
            for (int m = 0; T::kStrip && m < T::kRowTiles; ++m) {
              dev::store_shared(strip_tile + (m * strip_tiles + first / 8) * 512,
                                Float4{d_bias[m][0], d_bias[m][1], d_bias[m][2], d_bias[m][3]});
            }
          }
          TGA_UNROLL
          for (int r = 0; r < T::kGroup; ++r) {
            if (idle[r]) {
              continue;
            }
            accumulate_rows<T>(state[r].d_query, d_score[r], stage + r * 2 * T::kTileBytes, j * 16);
          }
        }
      };
      for (int step = 0; step < full; ++step) {
        visit(step, std::false_type());
      }
      for (int step = full; step < steps; ++step) {
        visit(step, std::true_type());
      }
    }
    TGA_UNROLL
    for (int r = 0; p.d_query.data != nullptr && r < T::kGroup; ++r) {
      const QueryPlace here = query_place<T>(p);
      const int64_t row = here.first_row + static_cast<int64_t>(group) * kRowsAtOnce + team * T::kGroup + r;
      if (row < here.end_row) {
        state[r].store(p, here.slab, row, here.head, here.first_query);
      }
    }
  }

  if constexpr (T::kStrip) {
    dev::sync_block();
    const QueryPlace place = query_place<T>(p);
    const PartialFragments partial(p, place.slab_number, place.chunk, place.head);
    const int64_t direct = p.d_bias.offset(place.slab, 0, place.head);
    for (int n = team; n < T::kRowTiles * strip_tiles; n += T::kTeams) {
      const int m = n / strip_tiles, key = n % strip_tiles * 8;
      store_bias_grad<T::kType>(p, partial, direct, place.first_query + m * 16, key,
                                dev::load_shared<Float4>(strip + n * 512));
    }
  }
}

}  // namespace torch_gated_attn::cuda
