// SPDX-License-Identifier: BSD-3-Clause
//
// Multiply-add peak of one core, the yardstick of benchmarks/run.py: twelve independent chains of one instruction.
// Twelve cover four cycles of latency at up to three issues per cycle and fit the sixteen registers of AVX2.
#include <chrono>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

constexpr long kIterations = 2'000'000;  // some 10 ms: longer than a timer tick, shorter than a scheduler's slice
constexpr int kChains = 12;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The instruction is written in assembly so that the compiler neither contracts nor vectorises anything else.
#define MEASURE(NAME, TARGET, VECTOR, INSTRUCTION, FLOPS)                            \
  __attribute__((target(TARGET))) double NAME() {                                    \
    VECTOR chain[kChains] = {}, factor = {};                                         \
    const double start = seconds();                                                  \
    for (long n = 0; n < kIterations; ++n) {                                         \
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) {                   \
        asm volatile(INSTRUCTION " %1, %1, %0" : "+v"(chain[i]) : "v"(factor));      \
      }                                                                              \
    }                                                                                \
    return double(FLOPS) * kChains * kIterations / (seconds() - start);              \
  }

MEASURE(fma256, "avx2,fma", __m256, "vfmadd231ps", 16)
MEASURE(fma512, "avx512f", __m512, "vfmadd231ps", 32)
MEASURE(dot512, "avx512f,avx512bf16", __m512, "vdpbf16ps", 64)

}  // namespace

// Flops per second of one run; 0 where this processor lacks the instruction.
extern "C" double peak_flops(const char* kind) {
  __builtin_cpu_init();
  if (!std::strcmp(kind, "fma256")) return __builtin_cpu_supports("fma") ? fma256() : 0;
  if (!std::strcmp(kind, "fma512")) return __builtin_cpu_supports("avx512f") ? fma512() : 0;
  if (!std::strcmp(kind, "dot512")) return __builtin_cpu_supports("avx512bf16") ? dot512() : 0;
  return 0;
}

#else

extern "C" double peak_flops(const char*) { return 0; }

#endif
