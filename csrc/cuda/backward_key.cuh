// SPDX-License-Identifier: BSD-3-Clause
//
// Backward, key-stationary: dK and dV.
//
// A block owns kRows keys of one key/value head, each of its teams for a batch row of its own, and walks the query tiles
// that see them of all query heads of that group: keys, values, dK and dV stay in registers. Scores are computed
// transposed, so that keys are the rows of every fragment: P^T and dS^T come out as the operands of the two sums, and a
// masked key only spoils its own row of dK and dV, which is set to zero at the end. The teams meet the same bias, which
// reaches them once through L1.
#pragma once

#include "query_plan.cuh"
#include "reordered_bias.cuh"
#include "scores_backward.cuh"

namespace torch_gated_attn::cuda {

// Ring of stages with a tile of queries, of dO and of row terms.
template <class T>
class QueryRing {
  using Copy = TileCopy<T, T::kThreads>;
  static constexpr int kRowBytes = T::kHeadDim * static_cast<int>(sizeof(typename T::Element));  // of dO

 public:
  static constexpr uint32_t kTermBytes = T::kBlock * 16;
  static constexpr uint32_t kStageBytes = 2 * T::kTileBytes + kTermBytes;

  TGA_DEVICE QueryRing(const BackwardParams& p, int thread, uint32_t base)
      : copy_(thread), thread_(thread), base_(base), query_bytes_(chunk_bytes<T>(copy_.chunk, p.head_dim)) {}

  // Begins with the queries of a head from `first` on; `exists` false brings zeros.
  TGA_DEVICE void begin(const BackwardParams& p, const typename T::Element* query, int64_t entry, int first, bool exists) {
    row_ = first + copy_.row;
    query_ = reinterpret_cast<const char*>(query + row_ * p.query.row + copy_.chunk * T::kChunk);
    grad_ = reinterpret_cast<const char*>(core_grad_rows<T>(p, entry, row_) + copy_.chunk * T::kChunk);
    terms_ = reinterpret_cast<const char*>(p.row_terms + (entry * p.q_padded + first + thread_) * 4);
    write_ = read_ = base_;
    end_ = exists ? p.q_len : 0;
  }

  TGA_DEVICE void copy_tile(const BackwardParams& p) {
    constexpr int kStep = Copy::kRowsPerPass;
    TGA_UNROLL
    for (int pass = 0; pass < Copy::kPasses; ++pass) {
      if (!copy_.has(pass)) {
        continue;
      }
      const uint32_t at = write_ + copy_.shared_offset + pass * kStep * T::kRowBytes;
      copy_chunk<!T::kGeneral>(at, query_ + row_offset<T>(pass * kStep, p.query.row),
                               row_ + pass * kStep < end_ ? query_bytes_ : 0, p.aligned);
      dev::copy_async(at + T::kTileBytes, grad_ + pass * kStep * kRowBytes, true);
    }
    if (thread_ < T::kBlock) {
      dev::copy_async(write_ + 2 * T::kTileBytes + thread_ * 16, terms_, true);
    }
    row_ += T::kBlock;
    query_ += row_offset<T>(T::kBlock, p.query.row);
    grad_ += T::kBlock * kRowBytes;
    terms_ += kTermBytes;
    advance(write_);
  }

  TGA_DEVICE uint32_t next_read() {
    const uint32_t stage = read_;
    advance(read_);
    return stage;
  }
  // Whether one of the rows whose shifts this thread copied for the next read is low.
  TGA_DEVICE bool has_low_row() const {
    if (thread_ >= T::kBlock || thread_ % 2 == 0) {
      return false;
    }
    const Float2 low = dev::load_shared<Float2>(read_ + 2 * T::kTileBytes + thread_ * 16 + 8);
    return low.x + low.y != 0.0f;
  }

 private:
  TGA_DEVICE void advance(uint32_t& stage) {
    stage += T::kTeams * kStageBytes;
    if (stage == base_ + T::kStages * T::kTeams * kStageBytes) {
      stage = base_;
    }
  }

  const Copy copy_;
  const int thread_;
  const uint32_t base_;
  const int query_bytes_;
  uint32_t write_ = 0, read_ = 0;
  int row_ = 0, end_ = 0;
  const char *query_ = nullptr, *grad_ = nullptr, *terms_ = nullptr;
};

template <class T>
struct KeyBlock {
  using Pairs = PairBits<16 * T::kRowTiles, T::kBlock / 32>;
  static constexpr uint32_t kRing = QueryPlan<T>::kBytes + T::kBlockThreads / 32 * Pairs::kWarpBytes;
  static constexpr uint32_t kSharedBytes = kRing + T::kStages * T::kTeams * QueryRing<T>::kStageBytes;
};

// Adds to every dV row what fully masked queries give it under masked_rows = "mean": their dO / K.
template <class T>
TGA_DEVICE void add_mean_rows(float (&d_value)[T::kRowTiles][T::kCols][4], const BackwardParams& p, int64_t entry) {
  const Lane lane = this_lane();
  float sum[T::kCols][2] = {};
  for (int query = lane.row; query < p.q_len; query += 8) {
    if (load_row_terms(p.row_terms + entry * p.q_padded * 4, query).shift != INFINITY) {
      continue;
    }
    const typename T::Element* row = core_grad_rows<T>(p, entry, query);
    TGA_UNROLL
    for (int n = 0; n < T::kCols; ++n) {
      const Float2 v = load_values<T::kType>(row, n * 8 + lane.pair * 2, T::kHeadDim, true);
      sum[n][0] += v.x;
      sum[n][1] += v.y;
    }
  }
  TGA_UNROLL
  for (int n = 0; n < T::kCols; ++n) {
    TGA_UNROLL
    for (int e = 0; e < 2; ++e) {
      TGA_UNROLL
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        sum[n][e] += dev::shuffle_xor(sum[n][e], lanes);
      }
      TGA_UNROLL
      for (int m = 0; m < T::kRowTiles; ++m) {
        d_value[m][n][e] += sum[n][e] / p.k_len;
        d_value[m][n][2 + e] += sum[n][e] / p.k_len;
      }
    }
  }
}

// What a thread works on.
struct KeyPlace {
  SlabIndex slab;
  int64_t slab_number, row;  // the team's batch row
  int kv_head, first_key;    // of this warp
};

template <class T>
TGA_DEVICE KeyPlace key_place(const BackwardParams& p) {
  // Worked out anew wherever it is needed, hence opaque: kept, it would fill a dozen registers through the main loop.
  int64_t index = p.first_block + dev::opaque(dev::block_index());
  const int key_tiles = (p.k_len + T::kRows - 1) / T::kRows;
  KeyPlace place;
  place.first_key =
      static_cast<int>(index % key_tiles) * T::kRows + dev::thread_index() % T::kThreads / 32 * 16 * T::kRowTiles;
  index /= key_tiles;
  const int64_t groups = (p.batch.rows + T::kTeams - 1) / T::kTeams;
  place.row = index % groups * T::kTeams + dev::thread_index() / T::kThreads;
  index /= groups;
  place.kv_head = static_cast<int>(index % p.kv_heads);
  place.slab_number = index / p.kv_heads;
  place.slab = slab_index(p.batch, place.slab_number);
  return place;
}

// The bias of a head as C operands, from the query `first_query` on.
template <class T>
TGA_DEVICE auto key_bias(const BackwardParams& p, const KeyPlace& place, int head, int first_query) {
  if constexpr (T::kTf32) {
    return BiasColumns<T>(p, element(p.bias.data, p.bias.offset(place.slab, 0, head), true), place.first_key, first_query);
  } else {
    return BiasAlongQueries<T>(p, bias_entry(p, place.slab_number, head), place.first_key, first_query);
  }
}

template <class T>
TGA_KERNEL(T::kBlockThreads, 1)
backward_key_kernel(TGA_PARAMS BackwardParams p) {
  const Lane lane = this_lane();
  const int team = dev::thread_index() / T::kThreads, thread = dev::thread_index() % T::kThreads;
  const KeyPlace place = key_place<T>(p);
  const int first_key = place.first_key, heads_per_kv = p.heads / p.kv_heads, kv_head = place.kv_head;
  const SlabIndex& slab = place.slab;
  const int64_t slab_number = place.slab_number, row = place.row;
  const bool exists = row < p.batch.rows;
  const float factor = score_factor<T>(p);

  QueryPlan<T> plan(dev::shared_base());
  plan.begin(p, slab, row);

  // Rows whose key no query attends to, as far as positions and a mask of keys say: they hold anything, and get zeros.
  bool attended[T::kRowTiles][2];
  TGA_UNROLL
  for (int m = 0; m < T::kRowTiles; ++m) {
    TGA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int key = first_key + m * 16 + lane.row + 8 * i;
      attended[m][i] = exists && !visibility<int64_t>(p, plan.length()).queries_of({key, key + 1}).empty();
      if (attended[m][i] && p.mask.data != nullptr && p.mask.row == 0) {
        bool any_head = false;
        for (int h = 0; h < (p.mask.head == 0 ? 1 : heads_per_kv); ++h) {
          any_head |= dev::load_global<uint8_t>(mask_of(p, slab, row, kv_head * heads_per_kv + h) + key * p.mask.col) != 0;
        }
        attended[m][i] = any_head;
      }
    }
  }

  uint32_t key[T::kRowTiles][T::kFragments][4], value[T::kRowTiles][T::kFragments][4];
  float d_key[T::kRowTiles][T::kCols][4], d_value[T::kRowTiles][T::kCols][4];
  TGA_UNROLL
  for (int m = 0; m < T::kRowTiles; ++m) {
    load_rows<T>(key[m], operand_rows<T>(p.key, slab, row, kv_head), p.key.row, first_key + m * 16, exists ? p.k_len : 0,
                 p.head_dim, !T::kGeneral || p.aligned);
    load_rows<T>(value[m], operand_rows<T>(p.value, slab, row, kv_head), p.value.row, first_key + m * 16,
                 exists ? p.k_len : 0, p.value_dim, !T::kGeneral || p.aligned);
    TGA_UNROLL
    for (int step = 0; step < T::kFragments; ++step) {
      TGA_UNROLL
      for (int i = 0; i < 4; ++i) {
        key[m][step][i] = attended[m][i % 2] ? key[m][step][i] : 0u;
        value[m][step][i] = attended[m][i % 2] ? value[m][step][i] : 0u;
      }
    }
    if (!T::kLogits && p.scale < 0) {
      negate(key[m]);
    }
    TGA_UNROLL
    for (int n = 0; n < T::kCols; ++n) {
      TGA_UNROLL
      for (int i = 0; i < 4; ++i) {
        d_key[m][n][i] = d_value[m][n][i] = 0.0f;
      }
    }
  }

  QueryRing<T> ring(p, thread, dev::shared_base() + KeyBlock<T>::kRing + team * QueryRing<T>::kStageBytes);
  // The tiles [begin, end) of a panel and head.
  const auto run = [&](int head, int panel, int begin, int end) {
    dev::sync_block();  // the last run's tiles are no longer read
    const KeyPlace here = key_place<T>(p);
    const bool here_exists = here.row < p.batch.rows;
    ring.begin(p, operand_rows<T>(p.query, here.slab, here.row, head),
               scratch_entry(p, here.slab_number, here_exists ? here.row : 0, head), begin * T::kBlock, here_exists);
    const auto issue = [&](int tile) {
      if (tile < end) {
        ring.copy_tile(p);
      }
      dev::commit_copies();
    };
    TGA_UNROLL
    for (int i = 0; i < T::kStages - 1; ++i) {
      issue(begin + i);
    }
    auto bias_rows = key_bias<T>(p, here, head, begin * T::kBlock);
    const GeneralBias<T::kType> general_bias(p, here.slab, here.row, head);
    // Waits for a tile; whether it has a low row.
    const auto arrive = [&](int tile) {
      dev::wait_copies<T::kStages - 2>();
      const bool low = dev::sync_block_any(!T::kLogits && ring.has_low_row());
      issue(tile + T::kStages - 1);
      return low;
    };
    // `asking`: with a look at each pair, and right for low rows.
    const auto visit = [&](int tile, auto asking) {
      constexpr bool kMasked = T::kGeneral || asking.value;
      const uint32_t queries = ring.next_read(), grads = queries + T::kTileBytes;
      const uint32_t terms = grads + T::kTileBytes + lane.pair * 32;
      if (kMasked && !plan.attends(p, panel, tile)) {
        bias_rows.next_tile();
        return;
      }
      if (thread == 0 && exists) {
        dev::count_tile(slab_number * p.batch.rows + row, head, tile * T::kBlock, T::kBlock, first_key, T::kRows, kMasked);
      }
      const typename KeyBlock<T>::Pairs pairs(dev::shared_base() + QueryPlan<T>::kBytes);
      if constexpr (kMasked) {
        pairs.sync();
        for (int word = 0; word < T::kBlock / 32; ++word) {
          pairs.write_keys(p, plan.pair_mask(), first_key, tile * T::kBlock + word * 32, word, plan.length());
        }
        pairs.sync();
      }
      TGA_UNROLL
      for (int j = 0; j < T::kBlock / 16; ++j) {
        // The branch also keeps the compiler from running two rounds side by side, for which float32 has no registers.
        if (T::kTf32 && tile * T::kBlock + j * 16 >= p.q_len) {
          break;
        }
        float bias[T::kRowTiles][2][4];
        TGA_UNROLL
        for (int m = 0; T::kBiasFragments && m < T::kRowTiles; ++m) {
          bias_rows.load(bias[m], j * 16, m);
        }
        uint32_t prob[T::kRowTiles][T::kOperandWords], d_score[T::kRowTiles][T::kOperandWords];
        uint32_t query[(T::kSteps + 1) / 2][4], grad[(T::kSteps + 1) / 2][4];
        TGA_UNROLL
        for (int e = 0; e < 2; ++e) {
          float s[T::kRowTiles][4], d_prob[T::kRowTiles][4];
          if (e * 8 % kRowsPerLoad<T::kSteps> == 0) {
            load_rows_as_columns<T::kSteps, T::kRowBytes>(query, queries, (2 * j + e) * 8);
            load_rows_as_columns<T::kSteps, T::kRowBytes>(grad, grads, (2 * j + e) * 8);
          }
          TGA_UNROLL
          for (int m = 0; m < T::kRowTiles; ++m) {
            score_pairs<T, true>(s[m], key[m], query, e, bias[m][e], factor);
          }
          const Float4 delta = dev::load_shared<Float4>(terms + (2 * j + e) * 128);
          const Float2 shift = dev::load_shared<Float2>(terms + (2 * j + e) * 128 + 16);
          const float negative_delta[4] = {delta.x, delta.y, delta.z, delta.w};
          TGA_UNROLL
          for (int m = 0; m < T::kRowTiles; ++m) {
            multiply<T>(d_prob[m], value[m], grad, e, negative_delta);
            float x[4], d[4];
            uint32_t attended_by[2] = {};
            if constexpr (kMasked) {
              attended_by[0] = pairs.from(m * 16 + lane.row, (2 * j + e) * 8) >> lane.pair * 2;
              attended_by[1] = pairs.from(m * 16 + lane.row + 8, (2 * j + e) * 8) >> lane.pair * 2;
            }
            TGA_UNROLL
            for (int i = 0; i < 4; ++i) {
              if constexpr (kMasked) {
                s[m][i] = visible_score<T>(s[m][i], attended_by[i / 2] >> (i % 2) & 1, general_bias, p,
                                           tile * T::kBlock + (2 * j + e) * 8 + lane.pair * 2 + i % 2,
                                           first_key + m * 16 + lane.row + i / 2 * 8);
              }
              x[i] = probability<T, asking.value>(s[m][i], factor, i % 2 == 0 ? shift.x : shift.y);
              d[i] = score_grad<kMasked>(x[i], d_prob[m][i]);
            }
            put_operand<T>(prob[m], e, x);
            put_operand<T>(d_score[m], e, d);
          }
        }
        accumulate_rows<T>(d_value, prob, grads, j * 16);
        accumulate_rows<T>(d_key, d_score, queries, j * 16);
      }
      bias_rows.next_tile();
    };
    int tile = begin;
    bool low = arrive(tile);
    while (tile < end) {
      const int stop = T::kGeneral ? end : plan.full_until(p, panel, tile, end);
      if (T::kGeneral || (tile < stop && !low)) {
        do {
          visit(tile, std::false_type());
          low = ++tile < stop && arrive(tile);
        } while (tile < stop && !low);
        if (tile == stop && tile < end) {
          low = arrive(tile);
        }
      } else {
        visit(tile, std::true_type());
        low = ++tile < end && arrive(tile);
      }
    }
  };
  for (int h = 0; h < heads_per_kv; ++h) {
    const auto tiles = [&] { return plan.tiles(p, key_place<T>(p).first_key / T::kRows * T::kRows); };
    const int step = plan.panel_tiles(p, tiles().size());
    for (int panel = tiles().begin, last = tiles().end; panel < last; panel += step) {
      const KeyPlace here = key_place<T>(p);
      const int head = here.kv_head * heads_per_kv + h, panel_end = panel + step < last ? panel + step : last;
      plan.build(p, here.slab, here.row, head, here.first_key / T::kRows * T::kRows, panel);
      for (int begin = plan.next(p, panel, panel, panel_end); begin < panel_end;) {
        const int end = plan.run_end(p, panel, begin, panel_end);
        run(head, panel, begin, end);
        begin = plan.next(p, panel, end, panel_end);
      }
    }
  }

  const KeyPlace here = key_place<T>(p);
  TGA_UNROLL
  for (int m = 0; m < T::kRowTiles; ++m) {
    TGA_UNROLL
    for (int n = 0; n < T::kCols; ++n) {
      TGA_UNROLL
      for (int i = 0; i < 4; ++i) {
        d_key[m][n][i] = attended[m][i / 2] ? d_key[m][n][i] * p.scale : 0.0f;
        d_value[m][n][i] = attended[m][i / 2] ? d_value[m][n][i] : 0.0f;
      }
    }
  }
  if (here.row >= p.batch.rows) {
    return;
  }
  for (int h = 0; p.mean_rows && h < heads_per_kv; ++h) {
    add_mean_rows<T>(d_value, p, scratch_entry(p, here.slab_number, here.row, here.kv_head * heads_per_kv + h));
  }
  const auto store = [&](const Operand& to, const float (&d)[T::kRowTiles][T::kCols][4], int cols) {
    if (to.data == nullptr) {
      return;
    }
    typename T::Element* const rows =
        static_cast<typename T::Element*>(to.data) + to.offset(here.slab, here.row, here.kv_head);
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      TGA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int k = here.first_key + m * 16 + lane.row + 8 * i;
        TGA_UNROLL
        for (int n = 0; n < T::kCols; ++n) {
          if (k < p.k_len) {
            store_pair<T::kType>(rows + k * to.row, n * 8 + lane.pair * 2, cols, !T::kGeneral || p.aligned, d[m][n][2 * i],
                                 d[m][n][2 * i + 1]);
          }
        }
      }
    }
  };
  store(p.d_key, d_key, p.head_dim);
  store(p.d_value, d_value, p.value_dim);
}

}  // namespace torch_gated_attn::cuda
