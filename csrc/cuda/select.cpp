// SPDX-License-Identifier: BSD-3-Clause
#include "select.h"

#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace torch_gated_attn::cuda {
namespace {

bool is_half(DType type) { return type == DType::kBFloat16 || type == DType::kFloat16; }

// Of the operands that the tensor-core kernels take.
int64_t element_bytes(const Problem& p) { return is_half(p.dtype) ? 2 : 4; }

// Every row of `view` begins at a multiple of `elements` elements of `bytes` bytes. Strides of size-1 dimensions do not
// count.
bool starts_aligned(const Problem& problem, const View& view, int64_t heads, int64_t rows, int64_t elements,
                    int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(view.data) % (elements * bytes) != 0) {
    return false;
  }
  for (int d = 0; d < kMaxBatchDims; ++d) {
    if (problem.batch[d] > 1 && view.batch[d] % elements != 0) {
      return false;
    }
  }
  return (heads <= 1 || view.head % elements == 0) && (rows <= 1 || view.row % elements == 0);
}

// Keys and values are copied by 16 bytes, all other operands by pairs.
bool operands_aligned(const Problem& p) {
  const int64_t bytes = element_bytes(p);
  const auto by_16_bytes = [&](const View& view) {
    return view.data == nullptr || starts_aligned(p, view, p.heads, std::max(p.q_len, p.k_len), 16 / bytes, bytes);
  };
  const bool gate_ok = p.gate.data == nullptr || p.gate.col == 0 || starts_aligned(p, p.gate, p.heads, p.q_len, 2, bytes);
  const auto by_pairs = [&](const View& view, int64_t rows) {
    return view.data == nullptr || starts_aligned(p, view, p.heads, rows, 2, bytes);
  };
  return by_16_bytes(p.query) && by_16_bytes(p.key) && by_16_bytes(p.value) && gate_ok && by_pairs(p.out, p.q_len) &&
         by_pairs(p.d_query, p.q_len) && by_pairs(p.d_key, p.k_len) && by_pairs(p.d_value, p.k_len) &&
         (p.d_gate.col == 0 || by_pairs(p.d_gate, p.q_len));
}

// One multiplication by a 32-bit stride in bytes finds a row.
bool strides_fit_32_bits(const Problem& p) {
  const auto fits = [&](int64_t stride) { return stride >= 0 && stride < (int64_t{1} << 31) / element_bytes(p); };
  return fits(p.query.row) && fits(p.key.row) && fits(p.value.row);
}

constexpr const char *kUnaligned = "an operand's rows are not aligned to 16 bytes",
                     *kWideStride = "a row stride does not fit 32 bits",
                     *kStridedBias = "the bias is not contiguous along the keys";

// Why the tensor-core kernels cannot take a float32 call; empty if they can.
std::string why_plain(const Problem& p, int arch) {
  if (arch < 80) {
    return "tensor cores take float32 from compute capability 8.0 on";
  }
  if (std::max(p.head_dim, p.value_dim) > kMaxTf32HeadDim) {
    return "head_dim is above " + std::to_string(kMaxTf32HeadDim) + ", where the tensor-core kernels for float32 end";
  }
  if (p.head_dim % 4 != 0 || p.value_dim % 4 != 0) {
    return "head_dim is not a multiple of 4";
  }
  if (!operands_aligned(p)) {
    return kUnaligned;
  }
  if (!strides_fit_32_bits(p)) {
    return kWideStride;
  }
  return p.bias.data != nullptr && p.bias.col != 1 && p.k_len > 1 ? kStridedBias : "";
}

// Why the fast kernels cannot take a 16-bit call; empty if they can.
std::string why_general(const Problem& p) {
  // Small enough that 1 / scale times a finite bias stays in range, large enough that -inf * scale is -inf.
  const double magnitude = std::fabs(p.scale);
  if (!(magnitude >= 0x1p-40 && magnitude <= 0x1p40)) {
    return "the scale is zero or out of the range the fast kernels fold into the exponent";
  }
  if (p.head_dim % 8 != 0 || p.value_dim % 8 != 0) {
    return "head_dim is not a multiple of 8";
  }
  if (!operands_aligned(p)) {
    return kUnaligned;
  }
  if (!strides_fit_32_bits(p)) {
    return kWideStride;
  }
  if (p.bias.data == nullptr) {
    return "";
  }
  // The scaled bias is bounded by the largest float; above this scale the exponent of that bound would overflow.
  if (magnitude * 1.4426950408889634 >= 1) {
    return "the scale is too large to carry the bias as an accumulator";
  }
  if (p.bias.col != 1 && p.k_len > 1) {
    return kStridedBias;
  }
  return "";
}

// Size of the last batch dimension that is one.
int64_t innermost_batch(const Problem& p) {
  int d = kMaxBatchDims - 1;
  while (d > 0 && p.batch[d] == 1) {
    --d;
  }
  return p.batch[d];
}

// Sharing the bias pays if the last group of batch rows is not mostly empty. The rows of a slab are one batch dimension.
bool sharing_pays(const Problem& p, int head_dim) {
  const int64_t rows = p.rows > 1 ? innermost_batch(p) : 1, group = forward_group(head_dim);
  return group > 1 && rows > 1 && (rows + group - 1) / group * group * 3 <= rows * 4;
}

int compiled_head_dim(int64_t dim) {
  for (const int width : {16, 32, 48, 64, 96, 128}) {
    if (dim <= width) {
      return width;
    }
  }
  return 0;
}

}  // namespace

const char* name(const Choice& choice) {
  switch (choice.kernel) {
    case Kernel::kTensorCore: return choice.access == BiasAccess::kGeneral ? "general tensor-core" : "tensor-core";
    case Kernel::kPlain: return "plain";
    default: return "composite";
  }
}

Choice choose_forward(const Problem& problem, int arch) {
  Choice choice;
  const int64_t dim = std::max(problem.head_dim, problem.value_dim);
  if (dim > kMaxHeadDim || problem.head_dim == 0 || problem.value_dim == 0) {
    choice.reason = "head_dim " + std::to_string(dim) + " is outside 1.." + std::to_string(kMaxHeadDim) +
                    ", the range of the fused kernels: the composite formula runs, which stores all scores";
    return choice;
  }
  const std::string plain = problem.dtype == DType::kFloat32 ? why_plain(problem, arch) : "";
  if (problem.dtype == DType::kFloat64 || !plain.empty()) {
    choice.kernel = Kernel::kPlain;
    choice.head_dim = compiled_head_dim(dim);
    choice.reason =
        plain.empty() ? "float64 takes the plain kernel" : "the plain kernel, in float32 multiply-adds: " + plain;
    return choice;
  }
  if (arch < 80) {
    choice.reason = "compute capability " + std::to_string(arch / 10) + "." + std::to_string(arch % 10) +
                    " is below 8.0, which the fused kernels need: the composite formula runs, which stores all scores";
    return choice;
  }
  choice.kernel = Kernel::kTensorCore;
  choice.head_dim = compiled_head_dim(dim);
  choice.aligned = operands_aligned(problem);
  const bool tf32 = problem.dtype == DType::kFloat32;
  const std::string general = tf32 ? "" : why_general(problem);
  const std::string kernel = tf32 ? "the float32 tensor-core kernel (three TF32 products)" : "the tensor-core kernel";
  if (!general.empty()) {
    choice.access = BiasAccess::kGeneral;
    choice.reason = "the general tensor-core kernel: " + general;
    return choice;
  }
  if (problem.bias.data == nullptr) {
    choice.reason = kernel + " without bias";
    return choice;
  }
  choice.access = problem.bias_dtype == DType::kFloat32 ? BiasAccess::kFloat : BiasAccess::kHalf;
  choice.share_bias = !tf32 && sharing_pays(problem, choice.head_dim);
  choice.reason = kernel + (choice.share_bias ? " that shares the bias between batch rows"
                            : tf32            ? " with bias"
                                              : " with a bias per batch row");
  if (!starts_aligned(problem, problem.bias, problem.heads, problem.q_len, 2,
                      problem.bias_dtype == DType::kFloat32 ? 4 : 2)) {
    choice.copy_bias = true;
    choice.reason += ", on a copy of the bias whose rows are aligned";
  }
  return choice;
}

Choice choose_backward(const Problem& problem, int arch) {
  Choice choice = choose_forward(problem, arch);
  if (choice.kernel != Kernel::kTensorCore) {
    return choice;
  }
  choice.grad_aligned = problem.grad_out.data != nullptr && problem.grad_out.col == 1 &&
                        starts_aligned(problem, problem.grad_out, problem.heads, problem.q_len, 2, element_bytes(problem));
  // The reordered copy of a bias that all queries share would be larger than the bias.
  if (is_half(problem.dtype) && problem.bias.data != nullptr && choice.access != BiasAccess::kGeneral &&
      problem.bias.row == 0 && problem.q_len > 1) {
    choice.access = BiasAccess::kGeneral;
    choice.reason = "the general tensor-core kernels: the bias is the same for all queries";
  }
  return choice;
}

}  // namespace torch_gated_attn::cuda
