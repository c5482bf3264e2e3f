// SPDX-License-Identifier: BSD-3-Clause
#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

namespace torch_gated_attn {
namespace {

constexpr const char* kVariable = "TORCH_GATED_ATTN_CPU_CAPABILITY";

// From the lowest to the highest; a machine that lacks one lacks those after it.
#if defined(__x86_64__)
constexpr const CpuKernels* kSets[] = {&kKernelsDefault, &kKernelsAvx2, &kKernelsAvx512, &kKernelsAvx512Bf16};

int supported_sets() {
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C too, a name that older compilers do not know here.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return 2;
  return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
}
// An Intel server core multiplies pairs at half the rate of floats, so there bfloat16 is multiplied as float; the figures
// are in docs/decisions/cpu-bfloat16-pairs.md.
int preferred_set() { return __builtin_cpu_is("amd") ? 3 : 2; }
#elif defined(__aarch64__)
constexpr const CpuKernels* kSets[] = {&kKernelsDefault, &kKernelsNeon};

int supported_sets() { return 2; }
int preferred_set() { return 1; }
#else
constexpr const CpuKernels* kSets[] = {&kKernelsDefault};

int supported_sets() { return 1; }
int preferred_set() { return 0; }
#endif

// "a, b or c"
std::string names() {
  const auto all = cpu_capabilities();
  std::string text = all[0];
  for (size_t i = 1; i < all.size(); ++i) text += (i + 1 < all.size() ? ", " : " or ") + std::string(all[i]);
  return text;
}

const CpuKernels& choose() {
  int wanted = preferred_set();
  if (const char* name = std::getenv(kVariable)) {
    wanted = 0;
    for (const char* known : cpu_capabilities()) {
      if (std::strcmp(name, known) == 0) break;
      ++wanted;
    }
    if (wanted == static_cast<int>(std::size(kSets)))
      throw std::runtime_error(std::string(kVariable) + " must be " + names() + ", but is '" + name + "'");
  }
  return *kSets[std::min(wanted, supported_sets() - 1)];
}

}  // namespace

std::vector<const char*> cpu_capabilities() {
  std::vector<const char*> all;
  for (const CpuKernels* set : kSets) all.push_back(set->name);
  return all;
}

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
