// SPDX-License-Identifier: BSD-3-Clause
//
// The kernels that the calls with planted bugs run, and no others: each bug compiles them anew. kPlantedType comes from the
// file that includes this.
#include "backward_launch.cuh"
#include "forward_launch.cuh"

namespace torch_gated_attn::cuda {

constexpr BiasAccess kPlantedBias = kPlantedType == DType::kFloat32 ? BiasAccess::kFloat : BiasAccess::kHalf;
using PlantedForward = ForwardTile<kPlantedType, 16, kPlantedBias, kPlantedType != DType::kFloat32>;
using PlantedQuery = QueryTile<kPlantedType, 16, kPlantedBias, true>;

template <>
void launch_forward<kPlantedType, 16>(const AttentionParams& p, BiasAccess, bool, void* stream) {
  launch_forward_tile<PlantedForward>(p, stream);
}
template <>
bool strip_fits<kPlantedType, 16>(int, BiasAccess, int) {
  return true;
}
template <>
int query_rows_at_once<kPlantedType, 16>(BiasAccess, bool) {
  return PlantedQuery::kTeams * PlantedQuery::kGroup;
}
template <>
void launch_backward_query<kPlantedType, 16>(const BackwardParams& p, BiasAccess, bool, void* stream) {
  launch_query_tile<PlantedQuery>(p, stream);
}
template <>
void launch_backward_key<kPlantedType, 16>(const BackwardParams& p, BiasAccess, void* stream) {
  launch_key_tile<KeyTile<kPlantedType, 16, kPlantedBias>>(p, stream);
}
template void launch_prepare_rows<kPlantedType, 16>(const BackwardParams&, void*);

}  // namespace torch_gated_attn::cuda
