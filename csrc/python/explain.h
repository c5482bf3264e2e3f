// SPDX-License-Identifier: BSD-3-Clause
//
// Which kernel a call would take, and why, from the layouts of its tensors: the launchers' own choice, nothing is computed.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace torch_gated_attn {

// A tensor without its values: dtype as in torch ("float32"), sizes, strides, and its address modulo 256, which says how it
// is aligned.
using Layout = std::tuple<std::string, std::vector<int64_t>, std::vector<int64_t>, int64_t>;

struct CallLayout {
  std::array<std::optional<Layout>, 7> tensors;  // query, key, value, gate, bias, mask, key_lengths
  std::optional<double> scale;
  std::string masked_rows;
  bool is_causal;
  std::optional<int64_t> window;
  bool bias_requires_grad;
  std::array<bool, 5> grad_mask;  // all false: the forward
};

// kernel, reason, details. `arch` is 10 * major + minor of a compute capability; without it the call runs on the CPU.
using Explanation = std::tuple<std::string, std::string, std::map<std::string, std::string>>;
Explanation explain(const CallLayout& call, std::optional<int> arch);

}  // namespace torch_gated_attn
