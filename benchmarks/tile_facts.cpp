// SPDX-License-Identifier: BSD-3-Clause
//
// Prints what a launch of every tensor-core kernel takes, which its machine code does not tell, a line each:
//
//   half forward D=32 half shared 256 47872 3 1      type of the operands, of 16 bits or fp32; name; threads and bytes of
//                                                    shared memory of a block; row tiles of 16 that a warp stores; teams
//                                                    that read the same bias
//
// sass_report.py compiles it for the host, against the emulated device of the tests. A strip of dBias is for 256 keys.
#include <cstdio>

#include "backward_launch.cuh"
#include "forward_launch.cuh"

namespace torch_gated_attn::cuda {
namespace {

constexpr int kKeys = 256;

template <BiasAccess kBias>
constexpr const char* kAccess = kBias == BiasAccess::kNone    ? "none"
                                : kBias == BiasAccess::kHalf  ? "half"
                                : kBias == BiasAccess::kFloat ? "float"
                                                              : "general";

template <class T>
void print(const char* name, const char* flag, int threads, int64_t shared_bytes, int row_tiles, int teams) {
  std::printf("%s %s D=%d %s%s %d %lld %d %d\n", T::kTf32 ? "fp32" : "half", name, T::kHeadDim, kAccess<T::kBias>, flag,
              threads, static_cast<long long>(shared_bytes), row_tiles, teams);
}

template <DType kType, int kHeadDim, BiasAccess kBias, bool kShares>
void print_forward() {
  using T = ForwardTile<kType, kHeadDim, kBias, kShares>;
  print<T>("forward", T::kGroup > 1 ? " shared" : "", T::kThreads, ForwardBlock<T>::kSharedBytes, T::kGroup * T::kRowTiles,
           1);
}

template <DType kType, int kHeadDim, BiasAccess kBias, bool kStrip>
void print_query() {
  using T = QueryTile<kType, kHeadDim, kBias, kStrip>;
  print<T>("backward_query", kStrip ? " strip" : "", T::kBlockThreads, QueryBlock<T>::shared_bytes(kKeys),
           T::kGroup * T::kRowTiles, T::kTeams);
}

template <DType kType, int kHeadDim, BiasAccess kBias>
void print_all() {
  constexpr bool kFragments = kBias == BiasAccess::kHalf || kBias == BiasAccess::kFloat;
  print_forward<kType, kHeadDim, kBias, false>();
  print_query<kType, kHeadDim, kBias, false>();
  if constexpr (kFragments) {
    if constexpr (kType != DType::kFloat32) {
      print_forward<kType, kHeadDim, kBias, true>();
    }
    print_query<kType, kHeadDim, kBias, true>();
  }
  using Key = KeyTile<kType, kHeadDim, kBias>;
  print<Key>("backward_key", "", Key::kBlockThreads, KeyBlock<Key>::kSharedBytes, Key::kRowTiles, Key::kTeams);
  if constexpr (kBias != BiasAccess::kNone) {
    using Bias = BiasTile<kType, kHeadDim, kBias>;
    print<Bias>("backward_bias", "", Bias::kThreads, BiasBlock<Bias>::kSharedBytes, Bias::kRowTiles, 1);
  }
}

template <int kHeadDim>
void print_head_dim() {
  print_all<DType::kBFloat16, kHeadDim, BiasAccess::kNone>();
  print_all<DType::kBFloat16, kHeadDim, BiasAccess::kHalf>();
  print_all<DType::kBFloat16, kHeadDim, BiasAccess::kFloat>();
  print_all<DType::kBFloat16, kHeadDim, BiasAccess::kGeneral>();
  if constexpr (kHeadDim <= kMaxTf32HeadDim) {
    print_all<DType::kFloat32, kHeadDim, BiasAccess::kNone>();
    print_all<DType::kFloat32, kHeadDim, BiasAccess::kFloat>();
  }
}

}  // namespace
}  // namespace torch_gated_attn::cuda

int main() {
  using namespace torch_gated_attn::cuda;
  print_head_dim<16>();
  print_head_dim<32>();
  print_head_dim<48>();
  print_head_dim<64>();
  print_head_dim<96>();
  print_head_dim<128>();
}
