// SPDX-License-Identifier: BSD-3-Clause
#include "../forward_launch.cuh"

namespace torch_gated_attn::cuda {
template void launch_forward<DType::kFloat32, 48>(const AttentionParams&, BiasAccess, bool, void*);
}
