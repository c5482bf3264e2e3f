// SPDX-License-Identifier: BSD-3-Clause
#include "params.h"

constexpr auto kPlantedType = torch_gated_attn::DType::kFloat32;

#include "planted.h"
