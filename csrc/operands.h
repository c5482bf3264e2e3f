// SPDX-License-Identifier: BSD-3-Clause
//
// From the arguments of a call to what its kernels take, and from their results back, once for every device and for
// explain(): checks, results, limits, calls with nothing to compute, and copies of what no kernel reads where it lies.
#pragma once

#include <optional>

#include "describe.h"

namespace torch_gated_attn {

struct PreparedForward {
  explicit PreparedForward(const Arguments& a);

  ForwardResult result;
  bool done = false;               // there was nothing to compute, the results are there
  std::optional<Problem> problem;  // none: the formula has to take the call
  Operands operands;

  ForwardResult finish();                        // when the kernels have run
  ForwardResult by_formula(const Arguments& a);  // instead of them
};

struct PreparedBackward {
  // `wide_gate_sums`: a gradient of the gate that has to be summed is in the accumulation type until then.
  PreparedBackward(const BackwardArguments& a, bool wide_gate_sums);

  Gradients result;
  bool done = false;
  std::optional<Problem> problem;
  Operands operands;       // d_bias contiguous, in the dtype that the bias is read in
  bool sums_gate = false;  // the kernels write a full gradient of the gate, which `finish` sums

  Gradients finish();
  Gradients by_formula(const BackwardArguments& a);
};

// Why `problem` is none.
constexpr const char* kTooManyDims =
    "more batch dimensions than kernels walk remain after those that all arguments walk alike are merged";

}  // namespace torch_gated_attn
