// SPDX-License-Identifier: BSD-3-Clause
#include "../plain_launch.cuh"

namespace torch_gated_attn::cuda {
template void launch_plain_forward<double>(const PlainParams<double>&, int, void*);
template void launch_plain_backward<double>(const PlainParams<double>&, int, void*);
}  // namespace torch_gated_attn::cuda
