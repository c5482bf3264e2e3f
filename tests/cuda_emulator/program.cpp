// SPDX-License-Identifier: BSD-3-Clause
//
// A few calls of the emulated kernels in a process of their own, for the sanitizers. Every operand is an allocation of
// exactly its size, so that a byte read past an end is seen.
#include <cstdio>
#include <random>

#include "emulated_memory.h"

namespace {

using namespace torch_gated_attn;

struct Call {
  const char* name;
  DType dtype, bias_dtype;
  int rows, heads, kv_heads, q_len, k_len, head_dim;
  bool bias, mean_rows;
  double scale;
};

// float32 calls keep 4-byte elements; all others 2-byte ones, small numbers of either sign.
class Operands {
 public:
  View make(int64_t rows, int64_t heads, int64_t length, int64_t last, int bytes, bool fill) {
    const int64_t elements = rows * heads * length * last;
    buffers_.push_back(std::make_unique<char[]>(elements * bytes));
    char* data = buffers_.back().get();
    for (int64_t i = 0; i < elements; ++i) {
      const float x = fill ? normal_(random_) : 0.0f;
      if (bytes == 4) {
        std::memcpy(data + i * 4, &x, 4);
      } else if (bytes == 2) {
        const uint16_t half = emulator::to_bfloat16(x);
        std::memcpy(data + i * 2, &half, 2);
      } else {
        data[i] = x < 0.7f;
      }
    }
    emulator::global_memory.allow(data, elements * bytes, !fill);
    View view;
    view.data = data;
    view.batch[kMaxBatchDims - 1] = rows == 1 ? 0 : heads * length * last;
    view.head = heads == 1 ? 0 : length * last;
    view.row = length == 1 ? 0 : last;
    view.col = 1;
    return view;
  }

 private:
  std::mt19937 random_{7};
  std::normal_distribution<float> normal_;
  std::vector<std::unique_ptr<char[]>> buffers_;
};

void run(const Call& call) {
  Operands operands;
  Problem p;
  p.dtype = call.dtype;
  p.bias_dtype = call.bias_dtype;
  p.batch[kMaxBatchDims - 1] = p.rows = call.rows;
  p.heads = call.heads;
  p.kv_heads = call.kv_heads;
  p.q_len = call.q_len;
  p.k_len = call.k_len;
  p.head_dim = p.value_dim = call.head_dim;
  p.scale = call.scale;
  p.mean_rows = call.mean_rows;
  const int bytes = call.dtype == DType::kFloat32 ? 4 : 2, bias_bytes = call.bias_dtype == DType::kFloat32 ? 4 : 2;
  const auto query_like = [&](bool fill) {
    return operands.make(call.rows, call.heads, call.q_len, call.head_dim, bytes, fill);
  };
  const auto key_like = [&](bool fill) {
    return operands.make(call.rows, call.kv_heads, call.k_len, call.head_dim, bytes, fill);
  };
  const auto per_row = [&](bool fill) {
    View view = operands.make(call.rows, call.heads, call.q_len, 1, 4, fill);
    view.row = 1;
    return view;
  };
  p.query = query_like(true), p.key = key_like(true), p.value = key_like(true), p.gate = query_like(true);
  p.mask = operands.make(call.rows, 1, 1, call.k_len, 1, true);
  if (call.bias) {
    p.bias = operands.make(1, call.heads, call.q_len, call.k_len, bias_bytes, true);
  }
  p.out = query_like(false), p.lse = per_row(false), p.row_max = per_row(false), p.row_sum = per_row(false);
  const int arch = 90;
  emulator::Scratch scratch;
  cuda::run_forward(p, cuda::choose_forward(p, arch), emulator::emulated_device(arch, scratch));
  p.grad_out = query_like(true), p.grad_lse = per_row(true);
  p.d_query = query_like(false), p.d_key = key_like(false), p.d_value = key_like(false), p.d_gate = query_like(false);
  if (call.bias) {
    p.d_bias = operands.make(1, call.heads, call.q_len, call.k_len, bias_bytes, false);
  }
  cuda::run_backward(p, cuda::choose_backward(p, arch), emulator::emulated_device(arch, scratch), false);
  emulator::global_memory.clear();
}

}  // namespace

int main() {
  const DType half = DType::kBFloat16, full = DType::kFloat32;
  const Call calls[] = {
      {"shared bias", half, half, 5, 2, 2, 70, 150, 16, true, false, 0.25},
      {"float32 bias", half, full, 3, 2, 1, 33, 65, 8, true, true, -0.5},
      {"general", half, half, 3, 1, 1, 19, 37, 13, true, true, 1.0},
      {"float32", full, full, 3, 2, 1, 33, 65, 12, true, true, 0.3},
      {"plain", full, full, 2, 2, 1, 19, 37, 13, true, true, 0.3},
  };
  int done = 0;
  for (const Call& call : calls) {
    run(call);
    ++done;
    if (!emulator::first_finding.empty()) {
      std::printf("%s: %s\n", call.name, emulator::first_finding.c_str());
      return 1;
    }
  }
  std::printf("%d calls, no findings\n", done);
  return 0;
}
