// SPDX-License-Identifier: BSD-3-Clause
//
// What a call must give, from the formula, in loops over double. Beside every result stands the sum of the absolute values
// of the terms it was summed from, which scales its rounding error.
#pragma once

#include <algorithm>
#include <cmath>

#include "call.h"

namespace core_test {

struct Sums {
  explicit Sums(const Sizes& s) : sizes(s) {
    int64_t n = s.heads * s.rows * s.cols;
    for (const int64_t b : s.batch) n *= b;
    value.resize(static_cast<size_t>(n));
    terms.resize(value.size());
  }
  // Dimensions of size 1 are broadcast.
  size_t index(const int64_t* b, int64_t h, int64_t r, int64_t c) const {
    int64_t i = 0;
    for (int d = 0; d < torch_gated_attn::kMaxBatchDims; ++d) i = i * sizes.batch[d] + (sizes.batch[d] == 1 ? 0 : b[d]);
    i = i * sizes.heads + (sizes.heads == 1 ? 0 : h);
    i = i * sizes.rows + (sizes.rows == 1 ? 0 : r);
    return static_cast<size_t>(i * sizes.cols + (sizes.cols == 1 ? 0 : c));
  }
  void add(const int64_t* b, int64_t h, int64_t r, int64_t c, double x, double size) {
    value[index(b, h, r, c)] += x;
    terms[index(b, h, r, c)] += std::fabs(size);
  }
  Sizes sizes;
  std::vector<double> value, terms;
};

struct Expected {
  Sums out, lse, d_query, d_key, d_value, d_gate, d_bias;
  explicit Expected(const Call& c)
      : out(c.out.sizes),
        lse(c.lse.sizes),
        d_query(c.query.sizes),
        d_key(c.key.sizes),
        d_value(c.value.sizes),
        d_gate(c.d_gate ? c.d_gate.sizes : c.out.sizes),
        d_bias(c.bias ? c.bias.sizes : c.lse.sizes) {
    Sizes rows = c.lse.sizes;
    for_each(rows, [&](const int64_t* b, int64_t h, int64_t i, int64_t) { row(c, b, h, i); });
  }

 private:
  // Written out here, not asked of visibility.h.
  static bool sees(const Call& c, const int64_t* b, int64_t i, int64_t j) {
    const Problem& p = c.p;
    const int64_t position = p.k_len - p.q_len + i;
    if (p.is_causal && j > position) return false;
    if (p.window > 0 && j <= position - p.window) return false;
    return !c.key_lengths || j < static_cast<const int64_t*>(c.key_lengths.view.data)[c.key_lengths.offset(b, 0, 0, 0)];
  }

  void row(const Call& c, const int64_t* b, int64_t h, int64_t i) {
    const Problem& p = c.p;
    const int64_t kv = h / (p.heads / p.kv_heads);
    std::vector<double> prob(static_cast<size_t>(p.k_len)), size(prob.size());
    double highest = -INFINITY, total = 0, largest = 0;
    for (int64_t j = 0; j < p.k_len; ++j) {
      double s = 0, terms = 0;
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const double term = p.scale * c.query(b, h, i, d) * c.key(b, kv, j, d);
        s += term, terms += std::fabs(term);
      }
      if (c.bias) s += c.bias(b, h, i, j);
      const bool attended = !c.mask || static_cast<const uint8_t*>(c.mask.view.data)[c.mask.offset(b, h, i, j)] != 0;
      prob[static_cast<size_t>(j)] = attended && sees(c, b, i, j) ? s : -INFINITY;
      largest = std::max(largest, terms + std::fabs(s));
      highest = std::max(highest, prob[static_cast<size_t>(j)]);
    }
    const bool dead = std::isinf(highest);
    for (double& x : prob) total += x = dead ? 0 : std::exp(x - highest);
    lse.add(b, h, i, 0, dead ? -INFINITY : highest + std::log(total), 1 + largest);
    for (double& x : prob) x = dead ? (p.mean_rows ? 1.0 / static_cast<double>(p.k_len) : 0) : x / total;

    std::vector<double> d_o(static_cast<size_t>(p.value_dim));
    double delta = 0, delta_terms = 0;
    for (int64_t d = 0; d < p.value_dim; ++d) {
      double o = 0, terms = 0;
      for (int64_t j = 0; j < p.k_len; ++j) {
        const double term = prob[static_cast<size_t>(j)] * c.value(b, kv, j, d);
        o += term, terms += std::fabs(term);
      }
      const double g = c.gate ? 1 / (1 + std::exp(-c.gate(b, h, i, d))) : 1;
      const double dy = c.grad_out ? c.grad_out(b, h, i, d) : 0;
      out.add(b, h, i, d, o * g, terms * g);
      d_gate.add(b, h, i, d, dy * o * g * (1 - g), dy * terms * g * (1 - g));
      d_o[static_cast<size_t>(d)] = dy * g;
      delta += dy * o * g, delta_terms += std::fabs(dy * terms * g);
    }
    if (c.grad_lse) delta -= c.grad_lse(b, h, i, 0), delta_terms += std::fabs(c.grad_lse(b, h, i, 0));
    for (int64_t j = 0; j < p.k_len; ++j) {
      const double prob_j = prob[static_cast<size_t>(j)];
      double dp = 0, dp_terms = 0;
      for (int64_t d = 0; d < p.value_dim; ++d) {
        const double term = d_o[static_cast<size_t>(d)] * c.value(b, kv, j, d);
        dp += term, dp_terms += std::fabs(term);
        d_value.add(b, kv, j, d, prob_j * d_o[static_cast<size_t>(d)], prob_j * d_o[static_cast<size_t>(d)]);
      }
      const double ds = dead ? 0 : prob_j * (dp - delta), ds_terms = dead ? 0 : prob_j * (dp_terms + delta_terms);
      if (c.bias) d_bias.add(b, h, i, j, ds, ds_terms);
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const double q = p.scale * c.query(b, h, i, d), k = p.scale * c.key(b, kv, j, d);
        d_query.add(b, h, i, d, ds * k, ds_terms * k);
        d_key.add(b, kv, j, d, ds * q, ds_terms * q);
      }
    }
  }
};

}  // namespace core_test
