// SPDX-License-Identifier: BSD-3-Clause
//
// Host functions of the kernels, each defined in the file that instantiates its kernel (CUDA 13 hides kernel symbols).
#pragma once

#include "params.h"

namespace torch_gated_attn::cuda {

template <DType kType, int kHeadDim>
void launch_forward(const AttentionParams& p, BiasAccess access, bool share_bias, void* stream);

// `elements` of the copy, of 4 bytes or of 2.
void launch_copy_bias(const CopyBiasParams& p, int64_t elements, bool is_float, void* stream);

// dO, delta, shifts, dGate; the reordered bias.
template <DType kType, int kHeadDim>
void launch_prepare_rows(const BackwardParams& p, void* stream);
template <DType kType>
void launch_transpose_bias(const BackwardParams& p, void* stream);

// Whether a strip of dBias for all keys fits next to the tiles in `shared_bytes`.
template <DType kType, int kHeadDim>
bool strip_fits(int k_len, BiasAccess access, int shared_bytes);

// Batch rows a block takes at a time; chunks are multiples of it.
template <DType kType, int kHeadDim>
int query_rows_at_once(BiasAccess access, bool strip);

template <DType kType, int kHeadDim>
void launch_backward_query(const BackwardParams& p, BiasAccess access, bool strip, void* stream);
template <DType kType, int kHeadDim>
void launch_backward_key(const BackwardParams& p, BiasAccess access, void* stream);
template <DType kType, int kHeadDim>
void launch_backward_bias(const BackwardParams& p, BiasAccess access, void* stream);
template <DType kType>
void launch_reduce_bias(const BackwardParams& p, void* stream);

template <class T>
void launch_plain_forward(const PlainParams<T>& p, int head_dim, void* stream);
template <class T>
void launch_plain_backward(const PlainParams<T>& p, int head_dim, void* stream);

}  // namespace torch_gated_attn::cuda
