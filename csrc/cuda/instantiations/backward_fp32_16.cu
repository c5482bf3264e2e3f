// SPDX-License-Identifier: BSD-3-Clause
#include "../backward_launch.cuh"

namespace torch_gated_attn::cuda {
template void launch_prepare_rows<DType::kFloat32, 16>(const BackwardParams&, void*);
template bool strip_fits<DType::kFloat32, 16>(int, BiasAccess, int);
template int query_rows_at_once<DType::kFloat32, 16>(BiasAccess, bool);
template void launch_backward_query<DType::kFloat32, 16>(const BackwardParams&, BiasAccess, bool, void*);
template void launch_backward_key<DType::kFloat32, 16>(const BackwardParams&, BiasAccess, void*);
template void launch_backward_bias<DType::kFloat32, 16>(const BackwardParams&, BiasAccess, void*);
}  // namespace torch_gated_attn::cuda
