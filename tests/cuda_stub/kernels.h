// SPDX-License-Identifier: BSD-3-Clause
//
// Takes the place of the kernels: every host function of csrc/cuda/kernels.h launches nothing in particular, on the stream
// it was given. Included before run_forward.cpp and run_backward.cpp, which instantiate what they call.
#pragma once

#include <cuda_runtime_api.h>

#include "../../csrc/cuda/kernels.h"

namespace torch_gated_attn::cuda {

inline void launch(void* stream) {
  cudaLaunchKernel(nullptr, dim3(1), dim3(1), nullptr, 0, static_cast<cudaStream_t>(stream));
}

template <DType, int>
void launch_forward(const AttentionParams&, BiasAccess, bool, void* stream) {
  launch(stream);
}
template <DType, int>
void launch_prepare_rows(const BackwardParams&, void* stream) {
  launch(stream);
}
template <DType>
void launch_transpose_bias(const BackwardParams&, void* stream) {
  launch(stream);
}
inline void launch_copy_bias(const CopyBiasParams&, int64_t, bool, void* stream) { launch(stream); }
template <DType, int>
bool strip_fits(int, BiasAccess, int) {
  return true;
}
template <DType, int>
int query_rows_at_once(BiasAccess, bool) {
  return 1;
}
template <DType, int>
void launch_backward_query(const BackwardParams&, BiasAccess, bool, void* stream) {
  launch(stream);
}
template <DType, int>
void launch_backward_key(const BackwardParams&, BiasAccess, void* stream) {
  launch(stream);
}
template <DType, int>
void launch_backward_bias(const BackwardParams&, BiasAccess, void* stream) {
  launch(stream);
}
template <DType>
void launch_reduce_bias(const BackwardParams&, void* stream) {
  launch(stream);
}
template <class T>
void launch_plain_forward(const PlainParams<T>&, int, void* stream) {
  launch(stream);
}
template <class T>
void launch_plain_backward(const PlainParams<T>&, int, void* stream) {
  launch(stream);
}

}  // namespace torch_gated_attn::cuda
