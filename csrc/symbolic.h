// SPDX-License-Identifier: BSD-3-Clause
//
// Comparisons of sizes and strides that read the same for int64_t and for c10::SymInt, the sizes of a traced call.
#pragma once

#include <c10/core/SymInt.h>

// PyTorch 2.7, which has no such choice yet, decides for a size not known yet as for one above 1.
#if !defined(TORCH_GUARD_OR_FALSE)
#define TORCH_GUARD_OR_FALSE(condition) TORCH_GUARD_SIZE_OBLIVIOUS(condition)
#endif

namespace torch_gated_attn {

// Requirements: a traced size whose value is not known yet becomes an assertion of the graph instead of an error here.
inline bool required_equal(int64_t a, int64_t b) { return a == b; }
inline bool required_equal(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

// Choices: false where the answer is not known yet. Both branches of a caller must be right.
inline bool known_equal(int64_t a, int64_t b) { return a == b; }
inline bool known_equal(const c10::SymInt& a, const c10::SymInt& b) { return TORCH_GUARD_OR_FALSE(a.sym_eq(b)); }
inline bool known_less(int64_t a, int64_t b) { return a < b; }
inline bool known_less(const c10::SymInt& a, const c10::SymInt& b) { return TORCH_GUARD_OR_FALSE(a.sym_lt(b)); }

}  // namespace torch_gated_attn
