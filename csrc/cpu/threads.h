// SPDX-License-Identifier: BSD-3-Clause
//
// PyTorch's threads, whatever compiles this. at::parallel_for lives in a header: without OpenMP it runs serially and says
// nothing, and with another OpenMP runtime than PyTorch's (clang's, beside the libgomp of its Linux wheels) it would start
// a second pool that torch.set_num_threads does not know. So only GCC is given -fopenmp; elsewhere a loop that is compiled
// into PyTorch, TensorIterator's, runs the threads. That takes 1 us more per call (2.4 instead of 1.3 for two threads).
#pragma once

#include <ATen/Parallel.h>
#if !defined(_OPENMP)
#include <ATen/TensorIterator.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/ParallelGuard.h>
#include <c10/util/SmallVector.h>
#endif

namespace torch_gated_attn {

// f(begin, end) for ranges that make up [0, n), each on a thread of its own as long as there are any.
template <class F>
void parallel_for(int64_t n, const F& f) {
#if defined(_OPENMP)
  at::parallel_for(0, n, 1, f);
#else
  if (n <= 1) {
    const c10::ParallelGuard guard(true);  // as at::parallel_for does
    return f(0, n);
  }
  c10::SmallVector<char, 64> places(n);  // whose addresses tell which range a thread has
  auto loop = at::TensorIteratorConfig()
                  .check_all_same_dtype(false)  // of one operand there is nothing to compare
                  .add_owned_output(at::from_blob(places.data(), {n}, at::kByte))
                  .resize_outputs(false)
                  .declare_static_shape({n})
                  .build();
  loop.for_each(
      [&](char** data, const int64_t*, int64_t count, int64_t) {
        const int64_t begin = data[0] - places.data();
        f(begin, begin + count);
      },
      /*grain_size=*/1);
#endif
}

}  // namespace torch_gated_attn
