// SPDX-License-Identifier: BSD-3-Clause
//
// Online softmax of score fragments. Everything is in units of log2: p = 2^(logit - shift).
#pragma once

#include "logits.cuh"

namespace torch_gated_attn::cuda {

// A row's shift is only raised once a score exceeds it by this many units: rescaling the accumulators is rare, and 2^8
// leaves float16 probabilities (largest 65504) room.
constexpr float kShiftSlack = 8.0f;
constexpr float kLargestFloat = 3.4028234663852886e38f;

// Output accumulators of one batch row and what its softmax has seen so far.
template <class T>
struct RowState {
  float acc[T::kRowTiles][T::kCols][4];
  // Sums over this thread's columns; total() adds up the four threads of a row.
  float sum[T::kRowTiles][2];
  // The largest logit seen, or up to kShiftSlack less. It begins at the lowest float, not at -inf, so that the -inf of an
  // excluded key minus it is -inf.
  float shift[T::kRowTiles][2];

  TGA_DEVICE void clear() {
    TGA_UNROLL
    for (int m = 0; m < T::kRowTiles; ++m) {
      TGA_UNROLL
      for (int i = 0; i < 4; ++i) {
        TGA_UNROLL
        for (int n = 0; n < T::kCols; ++n) {
          acc[m][n][i] = 0.0f;
        }
      }
      sum[m][0] = sum[m][1] = 0.0f;
      shift[m][0] = shift[m][1] = -kLargestFloat;
    }
  }

  TGA_DEVICE void rescale(int m, float first, float second) {
    TGA_UNROLL
    for (int n = 0; n < T::kCols; ++n) {
      acc[m][n][0] *= first;
      acc[m][n][1] *= first;
      acc[m][n][2] *= second;
      acc[m][n][3] *= second;
    }
    sum[m][0] *= first;
    sum[m][1] *= second;
  }

  // Turns the scores of row tile m into probabilities, packed as the A operands of the product with the values.
  TGA_DEVICE void softmax(int m, const float (&score)[T::kSubtiles][4], float factor,
                          uint32_t (&p)[T::kSubtiles / 2][T::kRowTiles][T::kOperandWords]) {
    float seen[2] = {-INFINITY, -INFINITY};
    TGA_UNROLL
    for (int n = 0; n < T::kSubtiles; ++n) {
      seen[0] = fmaxf(seen[0], fmaxf(score[n][0], score[n][1]));
      seen[1] = fmaxf(seen[1], fmaxf(score[n][2], score[n][3]));
    }
    bool raise[2];
    TGA_UNROLL
    for (int i = 0; i < 2; ++i) {
      seen[i] = fmaxf(seen[i], dev::shuffle_xor(seen[i], 1));
      seen[i] = fmaxf(seen[i], dev::shuffle_xor(seen[i], 2));
      seen[i] = logit<T>(seen[i], factor);
      raise[i] = seen[i] - shift[m][i] > kShiftSlack;
    }
    if (dev::any(raise[0] || raise[1])) {
      float keep[2];
      TGA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float raised = raise[i] ? seen[i] : shift[m][i];
        keep[i] = dev::exp2(shift[m][i] - raised);
        shift[m][i] = raised;
      }
      rescale(m, keep[0], keep[1]);
    }
    TGA_UNROLL
    for (int n = 0; n < T::kSubtiles; ++n) {
      float e[4];
      TGA_UNROLL
      for (int i = 0; i < 4; ++i) {
        e[i] = exponential<T>(score[n][i], factor, shift[m][i / 2]);
      }
      // Unrounded: lse is as accurate as float32 makes it.
      sum[m][0] += e[0] + e[1];
      sum[m][1] += e[2] + e[3];
      put_operand<T>(p[n / 2][m], n % 2, e);
    }
  }

  // What row i of row tile m sums to; called by whole warps.
  TGA_DEVICE float total(int m, int i) const {
    const float pair = sum[m][i] + dev::shuffle_xor(sum[m][i], 1);
    return pair + dev::shuffle_xor(pair, 2);
  }

  // acc += p * values.
  TGA_DEVICE void accumulate(const uint32_t (&p)[T::kSubtiles / 2][T::kRowTiles][T::kOperandWords], uint32_t values) {
    TGA_UNROLL
    for (int j = 0; j < T::kSubtiles / 2; ++j) {
      accumulate_rows<T>(acc, p[j], values, j * 16);
    }
  }
};

}  // namespace torch_gated_attn::cuda
