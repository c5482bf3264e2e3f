// SPDX-License-Identifier: BSD-3-Clause
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace torch_gated_attn {
namespace {

constexpr const char* kVariable = "TORCH_GATED_ATTN_CPU_CAPABILITY";

bool multiplies_pairs_fast() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const CpuKernels& choose() {
  // From the lowest to the highest; a machine that lacks one lacks those after it.
  const CpuKernels* sets[4] = {&kKernelsDefault};
  const char* names[] = {"default", "avx2", "avx512", "avx512_bf16"};
  int supported = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  sets[1] = &kKernelsAvx2, sets[2] = &kKernelsAvx512, sets[3] = &kKernelsAvx512Bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    supported = 2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      supported = __builtin_cpu_supports("avx512bf16") ? 4 : 3;
  }
#endif
  // An Intel server core multiplies pairs at half the rate of floats, so there bfloat16 is multiplied as float; the figures
  // are in docs/decisions/cpu-bfloat16-pairs.md.
  int wanted = multiplies_pairs_fast() ? 3 : 2;
  if (const char* name = std::getenv(kVariable)) {
    wanted = 0;
    while (wanted < 4 && std::strcmp(name, names[wanted]) != 0) ++wanted;
    if (wanted == 4)
      throw std::runtime_error(std::string(kVariable) + " must be default, avx2, avx512 or avx512_bf16, but is '" + name +
                               "'");
  }
  return *sets[wanted < supported ? wanted : supported - 1];
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

const char* cpu_capability() { return cpu_kernels().name; }

CpuChoice choose_cpu(const Problem& p) {
  if (has_few_queries(p))
    return {"few queries", "at most 4 queries share a key head, or 8 of head_dim 64 or more: a lane is a dimension"};
  return {"query per lane", "more queries share a key head than the path for few takes: each has a lane of a vector"};
}
static_assert(kFewQueries == 4 && kFewWideQueries == 8 && kWideHead == 64, "the sentences above say so");

}  // namespace torch_gated_attn
