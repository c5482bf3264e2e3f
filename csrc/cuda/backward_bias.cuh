// SPDX-License-Identifier: BSD-3-Clause
//
// Backward, bias-stationary: dBias alone, where the strip of backward_query.cuh does not fit shared memory (many keys) or
// the general kernel had to take the call.
//
// A block owns a tile of kRows queries by kBlock keys of one head: its bias and dBias stay in registers while those batch
// rows of a chunk flow by that attend to something of it.
#pragma once

#include "key_value_ring.cuh"
#include "reordered_bias.cuh"
#include "scores_backward.cuh"

namespace torch_gated_attn::cuda {

// Mask bits of one key tile for up to kPanelRows batch rows, for KeyValueRing.
template <class T>
class RowBits {
 public:
  static constexpr int kPanelRows = 32, kPanelWords = T::kBlock / 32;
  static constexpr uint32_t kBytes = 256 * ((kPanelRows * kPanelWords * 4 + 255) / 256);

  TGA_DEVICE explicit RowBits(uint32_t shared) : shared_(shared) {}

  TGA_DEVICE void build(const BlockSight& sight, int rows, int first_key) {
    const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
    dev::sync_block();  // the last rows' bits and tiles are no longer read
    for (int i = warp; i < rows * kPanelWords; i += T::kWarps) {
      const uint32_t bits = sight.vote(i / kPanelWords, first_key + i % kPanelWords * 32).some;
      if (lane == 0) {
        dev::store_shared(shared_ + i * 4, bits);
      }
    }
    dev::sync_block();
  }

  // The first row from `row` on that attends to something, or `rows`.
  TGA_DEVICE int next(int row, int rows) const {
    while (row < rows && empty(row)) {
      ++row;
    }
    return row;
  }

  TGA_DEVICE uint32_t bits_address(int row, uint32_t key) const { return shared_ + row * (kPanelWords * 4) + key / 8; }
  TGA_DEVICE uint32_t bits(int row, uint32_t key, int offset) const {
    return dev::load_shared<uint32_t>(bits_address(row, key) + offset / 32 * 4);
  }

 private:
  TGA_DEVICE bool empty(int row) const {
    uint32_t some = 0;
    for (int word = 0; word < kPanelWords; ++word) {
      some |= bits(row, 0, word * 32);
    }
    return some == 0;
  }

  uint32_t shared_;
};

template <class T>
struct BiasBlock {
  using Ring = KeyValueRing<T, RowBits<T>, 1, T::kThreads>;
  using Pairs = PairBits<16, T::kBlock / 32>;
  static constexpr uint32_t kSharedBytes = RowBits<T>::kBytes + Ring::kBytes + T::kWarps * Pairs::kWarpBytes;
};

// The bias of the block's tile as C operands; unused by kGeneral and without bias.
template <class T>
TGA_DEVICE void load_bias_tile(float (&bias)[T::kSubtiles][1][4], const BackwardParams& p, const SlabIndex& slab,
                               int64_t slab_number, int head, int first_query, int first_key) {
  if constexpr (T::kBias == BiasAccess::kHalf) {
    BiasAlongKeys<T> source(p, bias_entry(p, slab_number, head), first_query);
    source.begin_tile(first_key);
    TGA_UNROLL
    for (int n = 0; n < T::kSubtiles; n += 2) {
      uint32_t words[1][4];
      source.load(words, n / 2);
      source.operand(bias[n], words, 0);
      source.operand(bias[n + 1], words, 1);
    }
  } else if constexpr (T::kBias == BiasAccess::kFloat) {
    const BiasRows<T> source(p.bias, static_cast<const float*>(p.bias.data) + p.bias.offset(slab, 0, head), first_query,
                             p.q_len, 1.0f / fabsf(p.scale));
    TGA_UNROLL
    for (int n = 0; n < T::kSubtiles; ++n) {
      source.template load<true>(bias[n], first_key, n * 8, p.k_len);
    }
  }
}

template <class T>
TGA_KERNEL(T::kThreads, 1)
backward_bias_kernel(TGA_PARAMS BackwardParams p) {
  const Lane lane = this_lane();
  int64_t index = p.first_block + dev::block_index();
  const int key_tiles = (p.k_len + T::kBlock - 1) / T::kBlock, query_tiles = (p.q_len + T::kRows - 1) / T::kRows;
  const int first_key = static_cast<int>(index % key_tiles) * T::kBlock;
  index /= key_tiles;
  const int first_query = static_cast<int>(index % query_tiles) * T::kRows + dev::thread_index() / 32 * 16;
  index /= query_tiles;
  const int64_t chunk = index % p.chunks;
  index /= p.chunks;
  const int head = static_cast<int>(index % p.heads), kv_head = head / (p.heads / p.kv_heads);
  const int64_t slab_number = index / p.heads;
  const SlabIndex slab = slab_index(p.batch, slab_number);
  const int64_t first_row = chunk * p.rows_per_chunk;
  const int64_t end_row = first_row + p.rows_per_chunk < p.batch.rows ? first_row + p.rows_per_chunk : p.batch.rows;
  const float factor = score_factor<T>(p);

  float bias[T::kSubtiles][1][4], d_bias[T::kSubtiles][4];
  load_bias_tile<T>(bias, p, slab, slab_number, head, first_query, first_key);
  TGA_UNROLL
  for (int n = 0; n < T::kSubtiles; ++n) {
    TGA_UNROLL
    for (int i = 0; i < 4; ++i) {
      d_bias[n][i] = 0.0f;
    }
  }

  RowBits<T> mask_bits(dev::shared_base());
  const typename BiasBlock<T>::Pairs pairs(dev::shared_base() + RowBits<T>::kBytes + BiasBlock<T>::Ring::kBytes);
  typename BiasBlock<T>::Ring ring(p, dev::thread_index(), dev::shared_base() + RowBits<T>::kBytes);
  for (int64_t panel = first_row; panel < end_row; panel += RowBits<T>::kPanelRows) {
    const int rows = end_row - panel < RowBits<T>::kPanelRows ? static_cast<int>(end_row - panel) : RowBits<T>::kPanelRows;
    const BlockSight sight(p, slab, panel, head, first_query / T::kRows * T::kRows, T::kRows);
    mask_bits.build(sight, rows, first_key);
    ring.restart();
    ring.point_at(p, operand_rows<T>(p.key, slab, panel, kv_head), operand_rows<T>(p.value, slab, panel, kv_head));
    ring.begin_tile(p, mask_bits, first_key, 0, 0);
    int copied = 0;  // batch rows that the ring has passed
    const auto issue = [&](int row) {
      for (; copied < row; ++copied) {
        ring.next_batch_row(p);
      }
      if (row < rows) {
        ring.copy(p, ring.next_write());
      }
      dev::commit_copies();
    };
    int following = mask_bits.next(0, rows);
    issue(following);
    while (following < rows) {
      const int row = following;
      following = mask_bits.next(row + 1, rows);
      const int64_t batch_row = panel + row, entry = scratch_entry(p, slab_number, batch_row, head);
      uint32_t query[T::kFragments][4], grad[T::kFragments][4];
      load_rows<T>(query, operand_rows<T>(p.query, slab, batch_row, head), p.query.row, first_query, p.q_len, p.head_dim,
                   !T::kGeneral || p.aligned);
      load_rows<T>(grad, core_grad_rows<T>(p, entry, 0), T::kHeadDim, first_query, p.q_padded, T::kHeadDim, true);
      if (!T::kLogits && p.scale < 0) {
        negate(query);
      }
      const RowTerms terms[2] = {load_row_terms(p.row_terms + entry * p.q_padded * 4, first_query + lane.row),
                                 load_row_terms(p.row_terms + entry * p.q_padded * 4, first_query + lane.row + 8)};
      const float negative_delta[4] = {terms[0].negative_delta, terms[0].negative_delta, terms[1].negative_delta,
                                       terms[1].negative_delta};
      const GeneralBias<T::kType> general_bias(p, slab, batch_row, head);
      // The same bits for all queries, or those of this lane's two.
      uint32_t attended_at[2] = {mask_bits.bits_address(row, 0), mask_bits.bits_address(row, 0)};
      if (p.is_causal || sight.mask_is_of_pairs()) {
        const PairMask mask = {sight.mask_is_of_pairs() ? sight.mask + row * p.mask.batch_row : nullptr};
        pairs.sync();
        for (int word = 0; word < T::kBlock / 32; ++word) {
          pairs.write_queries(p, mask, first_query, first_key + word * 32, word, mask_bits.bits(row, 0, word * 32));
        }
        pairs.sync();
        attended_at[0] = pairs.address(lane.row);
        attended_at[1] = pairs.address(lane.row + 8);
      }
      dev::wait_copies<0>();
      dev::sync_block();
      issue(following);
      if (dev::thread_index() == 0) {
        dev::count_tile(slab_number * p.batch.rows + batch_row, head, first_query, T::kRows, first_key, T::kBlock, true);
      }
      const uint32_t keys = ring.next_read(), values = keys + T::kTileBytes;
      uint32_t key_rows[(T::kSteps + 1) / 2][4], value_rows[(T::kSteps + 1) / 2][4];
      TGA_UNROLL
      for (int n = 0; n < T::kSubtiles; ++n) {
        float score[4], d_prob[4];
        if (n * 8 % kRowsPerLoad<T::kSteps> == 0) {
          load_rows_as_columns<T::kSteps, T::kRowBytes>(key_rows, keys, n * 8);
          load_rows_as_columns<T::kSteps, T::kRowBytes>(value_rows, values, n * 8);
        }
        score_pairs<T>(score, query, key_rows, n, bias[n][0], factor);
        multiply<T>(d_prob, grad, value_rows, n, negative_delta);
        uint32_t attended[2];
        TGA_UNROLL
        for (int i = 0; i < 2; ++i) {
          attended[i] = dev::load_shared<uint32_t>(attended_at[i] + n / 4 * 4) >> (n % 4 * 8 + lane.pair * 2);
        }
        TGA_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float s = visible_score<T>(score[i], attended[i / 2] >> (i % 2) & 1, general_bias, p,
                                           first_query + lane.row + i / 2 * 8, first_key + n * 8 + lane.pair * 2 + i % 2);
          d_bias[n][i] += score_grad<true>(probability<T, true>(s, factor, terms[i / 2].shift), d_prob[i]);
        }
      }
    }
  }

  const PartialFragments partial(p, slab_number, chunk, head);
  const int64_t direct = p.d_bias.offset(slab, 0, head);
  TGA_UNROLL
  for (int n = 0; n < T::kSubtiles; ++n) {
    store_bias_grad<T::kType>(p, partial, direct, first_query, first_key + n * 8,
                              Float4{d_bias[n][0], d_bias[n][1], d_bias[n][2], d_bias[n][3]});
  }
}

// Sums the partials of one element of dBias, over parts and over every dimension the bias is broadcast along, in a fixed
// order.
template <DType kType>
TGA_KERNEL(128, 1)
reduce_bias_kernel(TGA_PARAMS BackwardParams p) {
  const int64_t index = (p.first_block + dev::block_index()) * 128 + dev::thread_index();
  const int heads = p.d_bias.head == 0 ? 1 : p.heads, queries = p.d_bias.row == 0 ? 1 : p.q_len,
            keys = p.d_bias.col == 0 ? 1 : p.k_len;
  const int64_t outers = p.batch.slabs / p.batch.slabs_per_outer;
  if (index >= outers * heads * queries * keys) {
    return;
  }
  const int key = static_cast<int>(index % keys), query = static_cast<int>(index / keys % queries);
  const int head = static_cast<int>(index / keys / queries % heads);
  const int64_t outer = index / keys / queries / heads;
  const int64_t parts = p.batch.slabs_per_outer * p.chunks, plane = static_cast<int64_t>(p.q_padded) * p.k_padded;
  float sum = 0.0f;
  for (int h = head; h < (heads == 1 ? p.heads : head + 1); ++h) {
    for (int q = query; q < (queries == 1 ? p.q_len : query + 1); ++q) {
      for (int k = key; k < (keys == 1 ? p.k_len : key + 1); ++k) {
        const int64_t fragment = static_cast<int64_t>(q / 16) * (p.k_padded / 8) + k / 8;
        const int64_t element = fragment * 128 + (q % 8 * 4 + k % 8 / 2) * 4 + q / 8 % 2 * 2 + k % 2;
        for (int64_t part = 0; part < parts; ++part) {
          sum += dev::load_global<float>(p.partial + ((part * outers + outer) * p.heads + h) * plane + element);
        }
      }
    }
  }
  const int64_t at = p.d_bias.offset(slab_index(p.batch, outer * p.batch.slabs_per_outer), 0, head) + query * p.d_bias.row +
                     key * p.d_bias.col;
  store_value<kType>(p.d_bias.data, at, sum, p.d_bias_is_float);
}

}  // namespace torch_gated_attn::cuda
