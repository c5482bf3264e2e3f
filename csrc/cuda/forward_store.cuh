// SPDX-License-Identifier: BSD-3-Clause
//
// The end of the forward: output divided by the sum and gated, lse, shift and sum. Every gate of a warp is on its way
// before the first row is stored.
#pragma once

#include "gate.cuh"
#include "softmax.cuh"

namespace torch_gated_attn::cuda {

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
  const float inverse = dev::reciprocal(static_cast<float>(p.k_len));
  TGA_UNROLL
  for (int n = 0; n < T::kCols; ++n) {
    TGA_UNROLL
    for (int e = 0; e < 2; ++e) {
      TGA_UNROLL
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        mean[n][e] += dev::shuffle_xor(mean[n][e], lanes);
      }
      mean[n][e] *= inverse;
    }
  }
}

// The gates of one row tile as this lane's chunks of it; `gate` is the batch row's.
template <class T>
struct RowGates {
  using Exchange = RowExchange<T::kCols>;
  Chunk<T::kType> logits[Exchange::kPerLane];

  TGA_DEVICE void load(const AttentionParams& p, const typename T::Element* gate, int first_query) {
    TGA_UNROLL
    for (int j = 0; j < Exchange::kPerLane; ++j) {
      const int query = first_query + Exchange::row(j);
      logits[j] = {};
      if (query < p.q_len) {
        logits[j] = load_gates<T::kType, !T::kGeneral>(gate + query * p.gate.row, p.gate.col, Exchange::col(j), p.value_dim,
                                                       !T::kGeneral || p.aligned);
      }
    }
  }
};

// Stores lse, shift and sum of one row tile, of which all lanes of a row know the sums; `rows` is the place of the batch
// row's first query in all three, which are of one layout.
template <class T>
TGA_DEVICE void store_sums(const RowState<T>& state, const AttentionParams& p, int64_t rows, int m, const float (&sums)[2],
                           int first_query) {
  const Lane lane = this_lane();
  // A lane of each row for each of the three.
  void* const to = lane.pair == 0 ? p.lse.data : lane.pair == 1 ? p.row_max.data : p.row_sum.data;
  TGA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int query = first_query + lane.row + 8 * i;
    const bool empty = sums[i] == 0.0f;
    const float shift = empty ? 0.0f : state.shift[m][i];
    const float lse = empty ? -INFINITY : (shift + dev::log2(sums[i])) * kLn2;
    if (query < p.q_len && lane.pair < 3) {
      dev::store_global(static_cast<float*>(to) + rows + query * p.lse.row, lane.pair == 0   ? lse
                                                                            : lane.pair == 1 ? shift
                                                                                             : sums[i]);
    }
  }
}

// Divides row tile m by its sums and hands it over to the lanes that store it. A row that attends to nothing is zero.
template <class T>
TGA_DEVICE void hand_over(const RowExchange<T::kCols>& exchange, const RowState<T>& state, int m, const float (&sums)[2]) {
  TGA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float inverse = sums[i] == 0.0f ? 0.0f : reciprocal_for<T::kType>(sums[i]);
    TGA_UNROLL
    for (int n = 0; n < T::kCols; ++n) {
      exchange.put(i, n, state.acc[m][n][2 * i] * inverse, state.acc[m][n][2 * i + 1] * inverse);
    }
  }
}

// Gates and stores this lane's chunks of a row tile; `out` is the batch row's.
template <class T>
TGA_DEVICE void store_chunks(const RowExchange<T::kCols>& exchange, const AttentionParams& p, const RowGates<T>& gates,
                             typename T::Element* out, int first_query) {
  using Exchange = RowExchange<T::kCols>;
  TGA_UNROLL
  for (int j = 0; j < Exchange::kPerLane; ++j) {
    float x[8];
    exchange.get(j, x);
    if (p.gate.data != nullptr) {
      float logits[8];
      unpack_chunk<T::kType>(logits, gates.logits[j]);
      TGA_UNROLL
      for (int i = 0; i < 8; ++i) {
        x[i] *= gate_factor<T::kType>(logits[i]).open;
      }
    }
    const int query = first_query + Exchange::row(j);
    if (query < p.q_len) {
      store_chunk<T::kType, !T::kGeneral>(out + query * p.out.row, Exchange::col(j), p.value_dim, !T::kGeneral || p.aligned,
                                          pack_chunk<T::kType>(x));
    }
  }
}

// Where the batch row begins that a block's operand is at, counted from the first of its `rows`.
template <class T>
struct StorePlace {
  using Element = typename T::Element;
  const Element *gate, *value;  // gate: null without
  Element* out;
  int64_t sums;  // of lse, row_max and row_sum alike

  TGA_DEVICE StorePlace(const AttentionParams& p, const SlabIndex& slab, int64_t first_row, int head)
      : gate(p.gate.data == nullptr ? nullptr
                                    : static_cast<const Element*>(p.gate.data) + p.gate.offset(slab, first_row, head)),
        value(static_cast<const Element*>(p.value.data) + p.value.offset(slab, first_row, head / (p.heads / p.kv_heads))),
        out(static_cast<Element*>(p.out.data) + p.out.offset(slab, first_row, head)),
        sums(p.lse.offset(slab, first_row, head)) {}
};

// Stores the mean of all values, gated, in the rows that attend to nothing: two bits of `empty` to a row tile, for the rows
// of this lane. Rare, hence rolled.
template <class T>
TGA_DEVICE void store_means(const AttentionParams& p, const StorePlace<T>& place, int rows, int first_query,
                            uint32_t empty) {
  const Lane lane = this_lane();
  const bool pairs_aligned = !T::kGeneral || p.aligned;
  TGA_ROLLED
  for (int tile = 0; tile < rows * T::kRowTiles; ++tile, empty >>= 2) {
    if (!dev::any((empty & 3) != 0)) {
      continue;
    }
    const int r = tile / T::kRowTiles;
    float mean[T::kCols][2];
    mean_of_values<T>(mean, place.value + r * p.value.batch_row, p);
    TGA_ROLLED
    for (int i = 0; i < 2; ++i) {
      const int query = first_query + tile % T::kRowTiles * 16 + lane.row + 8 * i;
      if ((empty >> i & 1) == 0 || query >= p.q_len) {
        continue;
      }
      const typename T::Element* const gate = place.gate + r * p.gate.batch_row + query * p.gate.row;
      typename T::Element* const out = place.out + r * p.out.batch_row + query * p.out.row;
      TGA_UNROLL
      for (int n = 0; n < T::kCols; ++n) {
        const int col = n * 8 + lane.pair * 2;
        Float2 open = {1.0f, 1.0f};
        if (place.gate != nullptr) {
          const Float2 logit = load_gate_pair<T::kType>(gate, p.gate.col, col, p.value_dim, pairs_aligned);
          open = {gate_factor<T::kType>(logit.x).open, gate_factor<T::kType>(logit.y).open};
        }
        store_pair<T::kType>(out, col, p.value_dim, pairs_aligned, mean[n][0] * open.x, mean[n][1] * open.y);
      }
    }
  }
}

// Stores what a warp computed of `rows` batch rows from `first_row` on. `shared`: memory of the block that holds tiles,
// kSharedBytes of it.
template <class T>
struct ForwardStore {
  static constexpr uint32_t kSharedBytes = T::kWarps * RowExchange<T::kCols>::kWarpBytes;

  static TGA_DEVICE void run(const RowState<T> (&state)[T::kGroup], const AttentionParams& p, const StorePlace<T>& place,
                             int rows, int first_query, uint32_t shared) {
    const RowExchange<T::kCols> exchange(shared);
    RowGates<T> gates[T::kGroup][T::kRowTiles];
    TGA_UNROLL
    for (int r = 0; place.gate != nullptr && r < T::kGroup; ++r) {
      TGA_UNROLL
      for (int m = 0; m < T::kRowTiles; ++m) {
        gates[r][m].load(p, place.gate + (r < rows ? r : 0) * p.gate.batch_row, first_query + m * 16);
      }
    }
    dev::sync_block();  // the last tiles are no longer read
    uint32_t empty = 0;
    TGA_UNROLL
    for (int r = 0; r < T::kGroup; ++r) {
      if (r >= rows) {
        break;
      }
      TGA_UNROLL
      for (int m = 0; m < T::kRowTiles; ++m) {
        const int first = first_query + m * 16;
        const float sums[2] = {state[r].total(m, 0), state[r].total(m, 1)};
        store_sums<T>(state[r], p, place.sums + r * p.lse.batch_row, m, sums, first);
        exchange.sync();
        hand_over<T>(exchange, state[r], m, sums);
        exchange.sync();
        store_chunks<T>(exchange, p, gates[r][m], place.out + r * p.out.batch_row, first);
        empty |= static_cast<uint32_t>((sums[0] == 0.0f) | (sums[1] == 0.0f) << 1) << 2 * (r * T::kRowTiles + m);
      }
    }
    if (p.mean_rows && dev::any(empty != 0)) {
      exchange.sync();  // the zeros come first
      store_means<T>(p, place, rows, first_query, empty);
    }
  }
};

}  // namespace torch_gated_attn::cuda
