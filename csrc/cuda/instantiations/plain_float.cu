// SPDX-License-Identifier: BSD-3-Clause
#include "../plain_launch.cuh"

namespace torch_gated_attn::cuda {
template void launch_plain_forward<float>(const PlainParams<float>&, int, void*);
template void launch_plain_backward<float>(const PlainParams<float>&, int, void*);
}  // namespace torch_gated_attn::cuda
