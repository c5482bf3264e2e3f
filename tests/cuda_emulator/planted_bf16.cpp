// SPDX-License-Identifier: BSD-3-Clause
#include "params.h"

constexpr auto kPlantedType = torch_gated_attn::DType::kBFloat16;

#include "planted.h"
