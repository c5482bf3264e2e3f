// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "aligned_bias.h"
#include "dispatch.h"
#include "kernels.h"
#include "make_params.h"
#include "run.h"

namespace torch_gated_attn::cuda {
namespace {

int padded(int n) { return (n + kPadding - 1) / kPadding * kPadding; }

int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Blocks of the chunked kernels wanted per multiprocessor: enough to even out their ends, few enough that partials stay
// small.
constexpr int64_t kWavesOfBlocks = 4;

// Splits the batch rows of a slab into chunks so that `blocks` blocks per chunk fill the device.
void split_rows(BackwardParams& p, int64_t blocks, int64_t rows_at_once, const Device& device) {
  const int64_t wanted =
      std::max<int64_t>(1, ceil_div(device.multiprocessors * kWavesOfBlocks, std::max<int64_t>(blocks, 1)));
  p.rows_per_chunk = ceil_div(ceil_div(p.batch.rows, wanted), rows_at_once) * rows_at_once;
  p.chunks = ceil_div(p.batch.rows, p.rows_per_chunk);
}

template <class Params>
void set_gradients(const Problem& problem, Params& p) {
  p.grad_out = make_operand(problem, problem.grad_out);
  p.grad_lse = make_operand(problem, problem.grad_lse);
  p.d_query = make_operand(problem, problem.d_query);
  p.d_key = make_operand(problem, problem.d_key);
  p.d_value = make_operand(problem, problem.d_value);
  p.d_gate = make_operand(problem, problem.d_gate);
  p.d_bias = make_operand(problem, problem.d_bias);
}

BackwardParams make_backward_params(const Problem& problem, const Choice& choice, bool d_gate_is_float) {
  BackwardParams p;
  static_cast<AttentionParams&>(p) = make_params(problem);
  p.aligned = choice.aligned;
  set_gradients(problem, p);
  p.d_bias_is_float = p.bias_is_float;
  p.d_gate_is_float = d_gate_is_float;
  p.grad_pairs_aligned = choice.grad_aligned;
  p.q_padded = padded(p.q_len);
  p.k_padded = padded(p.k_len);
  return p;
}

// Whether a block can store its dBias instead of a part of a sum.
bool stores_bias_directly(const BackwardParams& p) {
  return p.batch.slabs_per_outer * p.chunks == 1 && (p.d_bias.head != 0 || p.heads == 1) &&
         (p.d_bias.row != 0 || p.q_len == 1) && (p.d_bias.col != 0 || p.k_len == 1);
}

template <class T>
void run_plain(const Problem& problem, const Choice& choice, const Device& device) {
  PlainParams<T> p;
  static_cast<AttentionParams&>(p) = make_params(problem);
  p.exact_scale = problem.scale;
  set_gradients(problem, p);
  const int64_t rows = p.batch.slabs * p.batch.rows * p.heads * p.q_len;
  p.row_terms = static_cast<T*>(device.allocate(rows * 3 * sizeof(T)));
  p.core_grad = static_cast<T*>(device.allocate(rows * p.value_dim * sizeof(T)));
  launch_plain_backward<T>(p, choice.head_dim, device.stream);
}

}  // namespace

void run_backward(const Problem& problem, const Choice& choice, const Device& device, bool d_gate_is_float) {
  if (choice.kernel == Kernel::kPlain) {
    return problem.dtype == DType::kFloat64 ? run_plain<double>(problem, choice, device)
                                            : run_plain<float>(problem, choice, device);
  }
  BackwardParams p = make_backward_params(problem, choice, d_gate_is_float);
  const int64_t entries = p.batch.slabs * p.batch.rows * p.heads, outers = p.batch.slabs / p.batch.slabs_per_outer;
  const int64_t element_bytes = problem.dtype == DType::kFloat32 ? 4 : 2;
  p.core_grad = device.allocate(entries * p.q_padded * choice.head_dim * element_bytes);
  p.row_terms = static_cast<float*>(device.allocate(entries * p.q_padded * 4 * sizeof(float)));
  dispatch_tensor_core(problem.dtype, choice.head_dim, [&](auto type_constant, auto dim_constant) {
    constexpr DType kType = type_constant.value;
    constexpr int kHeadDim = dim_constant.value;
    const BiasAccess access = choice.access;
    launch_prepare_rows<kType, kHeadDim>(p, device.stream);
    // A 16-bit bias is read in its reordered copy only, which is made element by element.
    if (choice.copy_bias && access == BiasAccess::kFloat) {
      p.bias = copy_bias(p, device);
    }
    if constexpr (kType != DType::kFloat32) {
      if (access == BiasAccess::kHalf || access == BiasAccess::kFloat) {
        const int64_t planes = outers * (p.bias.head == 0 ? 1 : p.heads);
        p.bias_t = device.allocate(planes * p.q_padded * p.k_padded * (p.bias_is_float ? 4 : 2));
        launch_transpose_bias<kType>(p, device.stream);
      }
    }

    // dBias comes with dQ where the strip fits, by a kernel of its own where not.
    const bool wants_bias = p.d_bias.data != nullptr;
    const bool strip = wants_bias && strip_fits<kType, kHeadDim>(p.k_len, access, device.shared_bytes);
    const auto with_partials = [&](int64_t blocks, int64_t rows_at_once, auto launch) {
      BackwardParams chunked = p;
      split_rows(chunked, blocks, rows_at_once, device);
      chunked.d_bias_direct = stores_bias_directly(chunked);
      if (!chunked.d_bias_direct) {
        const int64_t parts = chunked.batch.slabs_per_outer * chunked.chunks;
        chunked.partial = static_cast<float*>(
            device.allocate(parts * outers * p.heads * p.q_padded * p.k_padded * static_cast<int64_t>(sizeof(float))));
      }
      launch(chunked);
      if (!chunked.d_bias_direct) {
        launch_reduce_bias<kType>(chunked, device.stream);
      }
    };
    // 64 queries to a block of either kernel.
    const int64_t query_blocks = ceil_div(p.q_len, 64) * p.heads * p.batch.slabs;
    if (strip) {
      with_partials(query_blocks, query_rows_at_once<kType, kHeadDim>(access, true), [&](const BackwardParams& chunked) {
        launch_backward_query<kType, kHeadDim>(chunked, access, true, device.stream);
      });
    } else {
      if (p.d_query.data != nullptr) {
        BackwardParams alone = p;
        alone.rows_per_chunk = query_rows_at_once<kType, kHeadDim>(access, false);
        alone.chunks = ceil_div(p.batch.rows, alone.rows_per_chunk);
        launch_backward_query<kType, kHeadDim>(alone, access, false, device.stream);
      }
      if (wants_bias) {
        with_partials(query_blocks * ceil_div(p.k_len, 64), 1, [&](const BackwardParams& chunked) {
          launch_backward_bias<kType, kHeadDim>(chunked, access, device.stream);
        });
      }
    }
    if (p.d_key.data != nullptr || p.d_value.data != nullptr) {
      launch_backward_key<kType, kHeadDim>(p, access, device.stream);
    }
  });
}

}  // namespace torch_gated_attn::cuda
