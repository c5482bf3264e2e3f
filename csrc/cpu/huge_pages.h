// SPDX-License-Identifier: BSD-3-Clause
//
// Fresh memory is touched for the first time by the kernels: on 4 KiB pages the faults of a training step take up to a
// quarter of its time. Large results therefore ask for huge pages, as NumPy does for its arrays.
#pragma once

#include <ATen/core/Tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torch_gated_attn {

inline const at::Tensor& prefer_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (!tensor.defined() || tensor.nbytes() < 2 * kHugePage) return tensor;
  // Whole huge pages inside the tensor only. A kernel that refuses leaves the pages small, which is no error.
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace torch_gated_attn
