// SPDX-License-Identifier: BSD-3-Clause
//
// The torch-free core by itself: random calls in memory beside protected pages, judged by the formula in double. Built with
// one sanitizer or another by test_core.py; with -DTORCH_GATED_ATTN_LIBFUZZER it is a libFuzzer target instead.
//
//   driver CAPABILITY SEED CALLS THREADS [LARGEST]     LARGEST: of a drawn size
#include "expected.h"
#include "run.h"

namespace core_test {
namespace {

std::vector<unsigned char> contents(const Tensor& t) {
  if (!t) return {};
  const size_t element = bytes_of(t.type);
  const auto* data = static_cast<const unsigned char*>(t.view.data);
  return {data, data + static_cast<size_t>(t.elements) * element};
}

// Relative to the sum of the terms: a few roundings of the type, and of P and dS in 16 bits.
double tolerance(DType type) {
  switch (type) {
    case DType::kFloat64: return 1e-12;
    case DType::kBFloat16: return 0x1p-6;
    case DType::kFloat16: return 0x1p-9;
    default: return 1e-5;
  }
}

void compare(const char* name, const Tensor& result, const Sums& expected, DType judged_as) {
  if (!result) return;
  std::vector<bool> written(static_cast<size_t>(result.elements));
  for_each(result.sizes, [&](const int64_t* b, int64_t h, int64_t r, int64_t c) {
    const double x = result(b, h, r, c), y = expected.value[expected.index(b, h, r, c)];
    const double bound = tolerance(judged_as) * (1e-4 + expected.terms[expected.index(b, h, r, c)]);
    written[static_cast<size_t>(result.offset(b, h, r, c))] = true;
    if (x != y && !(std::fabs(x - y) <= bound)) {
      std::fprintf(stderr, "%s[%d, %d, %d]: %g, expected %g +- %g\n", name, static_cast<int>(h), static_cast<int>(r),
                   static_cast<int>(c), x, y, bound);
      fail("a wrong result");
    }
  });
  const auto bytes = contents(result);
  const size_t element = bytes_of(result.type);
  for (size_t i = 0; i < bytes.size(); ++i)
    if (!written[i / element] && bytes[i] != 0xff) fail("a gap between results was written");
}

void check_call(Call& c, const CpuKernels& kernels, int threads) {
  const auto inputs = [&] {
    std::vector<std::vector<unsigned char>> all;
    for (const Tensor* t : {&c.query, &c.key, &c.value, &c.gate, &c.bias, &c.grad_out, &c.grad_lse})
      all.push_back(contents(*t));
    return all;
  };
  const auto results = [&] {
    std::vector<std::vector<unsigned char>> all;
    for (const Tensor* t : {&c.out, &c.lse, &c.d_query, &c.d_key, &c.d_value, &c.d_gate, &c.d_bias})
      all.push_back(contents(*t));
    return all;
  };
  const auto before = inputs();
  const Expected expected(c);
  run_forward(c, kernels, threads);
  run_backward(c, kernels, threads);
  if (before != inputs()) fail("an input was written");

  const DType type = c.p.dtype, sum = sum_type(type);
  compare("out", c.out, expected.out, type);
  compare("lse", c.lse, expected.lse, sum);
  compare("d_query", c.d_query, expected.d_query, type);
  compare("d_key", c.d_key, expected.d_key, type);
  compare("d_value", c.d_value, expected.d_value, type);
  compare("d_gate", c.d_gate, expected.d_gate, type);
  compare("d_bias", c.d_bias, expected.d_bias, type);
  if (threads > 1) {
    const auto several = results();
    run_forward(c, kernels, 1);
    run_backward(c, kernels, 1);
    if (several != results()) fail("one thread gives other bits");
  }
}

bool supported(const char* name) {
#if defined(__x86_64__)
  // Every processor with AVX2 has F16C too, a name that clang does not know here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  if (!std::strcmp(name, "neon")) return true;
#endif
  return !std::strcmp(name, "default");
}

// Null where this program was built without the set.
const CpuKernels* kernels_of(const char* name) {
#if defined(WITH_DEFAULT)
  if (!std::strcmp(name, "default")) return &torch_gated_attn::kKernelsDefault;
#endif
#if defined(WITH_AVX2)
  if (!std::strcmp(name, "avx2")) return &torch_gated_attn::kKernelsAvx2;
#endif
#if defined(WITH_AVX512)
  if (!std::strcmp(name, "avx512")) return &torch_gated_attn::kKernelsAvx512;
#endif
#if defined(WITH_AVX512_BF16)
  if (!std::strcmp(name, "avx512_bf16")) return &torch_gated_attn::kKernelsAvx512Bf16;
#endif
#if defined(WITH_NEON)
  if (!std::strcmp(name, "neon")) return &torch_gated_attn::kKernelsNeon;
#endif
  return nullptr;
}

}  // namespace
}  // namespace core_test

#if defined(TORCH_GATED_ATTN_LIBFUZZER)
// The first byte chooses the instruction set. Large calls are left out: the loops over double would take a second for one,
// and a hundred small ones tell the fuzzer more.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr double kMostProducts = 1 << 17;
  if (size == 0) return 0;
  std::vector<const core_test::CpuKernels*> sets;
  for (const char* name : {"default", "avx2", "avx512", "avx512_bf16", "neon"})
    if (const auto* kernels = core_test::kernels_of(name); kernels && core_test::supported(name)) sets.push_back(kernels);
  core_test::Bytes bytes(data + 1, size - 1);
  core_test::Call call(bytes, 40);
  const auto& p = call.p;
  double products = static_cast<double>(p.heads * p.q_len * p.k_len * (p.head_dim + p.value_dim));
  for (const int64_t n : p.batch) products *= static_cast<double>(n);
  if (products <= kMostProducts) core_test::check_call(call, *sets[data[0] % sets.size()], 1);
  return 0;
}
#else
int main(int argc, char** argv) {
  if (argc < 5) return 2;
  const char* name = argv[1];
  const uint64_t first = std::strtoull(argv[2], nullptr, 10), calls = std::strtoull(argv[3], nullptr, 10);
  const int threads = std::atoi(argv[4]);
  const int64_t largest = argc > 5 ? std::atoll(argv[5]) : 40;
  const auto* kernels = core_test::kernels_of(name);
  if (!kernels) return 2;
  if (!core_test::supported(name)) {
    std::printf("this machine lacks %s\n", name);
    return 3;
  }
  for (uint64_t seed = first; seed < first + calls; ++seed) {
    std::fprintf(stderr, "%s %s %llu 1 %d %d\n", argv[0], name, static_cast<unsigned long long>(seed), threads,
                 static_cast<int>(largest));  // the last line of a run that fails repeats its call
    uint8_t bytes[core_test::kBytesOfACall];
    core_test::Numbers numbers(seed * 2 + 1);
    for (uint8_t& b : bytes) b = static_cast<uint8_t>((numbers.next() + 1) * 128);
    core_test::Bytes drawn(bytes, sizeof bytes);
    core_test::Call call(drawn, largest);
    if (drawn.ran_out()) core_test::fail("kBytesOfACall is too small");
    core_test::check_call(call, *kernels, threads);
  }
  std::printf("%llu calls\n", static_cast<unsigned long long>(calls));
  return 0;
}
#endif
