// SPDX-License-Identifier: BSD-3-Clause
//
// Thin wrapper over what the kernels need of the device; the only file with PTX. Kernels include nothing else of CUDA, so
// that a host compiler builds the very same sources against an emulated wrapper (tests/cuda_emulator/emulated_device.h).
// Shared memory is addressed by the 32-bit offsets that ldmatrix and cp.async take.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../problem.h"
#include "annotations.h"

namespace torch_gated_attn::cuda {

struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};

}  // namespace torch_gated_attn::cuda

#ifndef __CUDACC__
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch_error.h"

namespace torch_gated_attn::cuda::dev {

TGA_DEVICE int thread_index() { return threadIdx.x; }
TGA_DEVICE int block_index() { return blockIdx.x; }

TGA_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(256) unsigned char dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

TGA_DEVICE void sync_block() { __syncthreads(); }
// The same barrier; whether any thread of the block brought true.
TGA_DEVICE bool sync_block_any(bool x) { return __syncthreads_or(x) != 0; }
// Keeps the compiler from moving loads of shared memory further ahead than there are registers for.
TGA_DEVICE void sync_warp() { __syncwarp(); }

// Copies 16 bytes if `valid`, else writes zeros and reads nothing.
TGA_DEVICE void copy_async(uint32_t shared, const void* global, bool valid) {
  asm volatile(
      "{ .reg .pred ignore; setp.eq.u32 ignore, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, ignore; }" ::"r"(shared),
      "l"(global), "r"(static_cast<uint32_t>(valid))
      : "memory");
}
// Reads only the first `bytes` of the 16, the rest becomes zero. Costs six more instructions than copy_async.
TGA_DEVICE void copy_async_part(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
TGA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
TGA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
TGA_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
TGA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// The transpose of an 8x8 matrix of 16-bit values in fragment layout.
TGA_DEVICE uint32_t transpose_matrix(uint32_t fragment) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

// d = a * b + c for a 16x16 tile a, a 16x8 tile b and float32 accumulators.
template <DType kType>
TGA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  if constexpr (kType == DType::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

// Two floats rounded to nearest into one word, `low` in the lower half.
template <DType kType>
TGA_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (kType == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}
// The bits of a float, and back.
TGA_DEVICE uint32_t as_word(float x) { return __float_as_uint(x); }
TGA_DEVICE float as_float(uint32_t word) { return __uint_as_float(word); }

// d = a * b + c for a 16x8 tile a and an 8x8 tile b of TF32 numbers, floats whose lower 13 bits are zero, and float32
// accumulators.
TGA_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <DType kType>
TGA_DEVICE Float2 unpack(uint32_t word) {
  if constexpr (kType == DType::kBFloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&word));
    return {v.x, v.y};
  }
}

TGA_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TGA_DEVICE double exp2(double x) { return ::exp2(x); }
TGA_DEVICE float log2(float x) { return ::log2f(x); }
TGA_DEVICE double log2(double x) { return ::log2(x); }
TGA_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
TGA_DEVICE double reciprocal(double x) { return 1.0 / x; }
// A product rounded by itself: never fused with an addition, so that every kernel gets the same number.
TGA_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }
// Rounds toward zero: a finite product never becomes infinite, an infinite factor stays infinite.
TGA_DEVICE float multiply_toward_zero(float x, float y) { return __fmul_rz(x, y); }
TGA_DEVICE float fma_toward_zero(float x, float y, float z) { return __fmaf_rz(x, y, z); }
TGA_DEVICE double fma_toward_zero(double x, double y, double z) { return __fma_rz(x, y, z); }

// A tile of pairs that a block computes: `masked` with a look at each pair. For the emulator, which counts them.
TGA_DEVICE void count_tile(int64_t /*batch entry*/, int /*head*/, int /*first query*/, int /*queries*/, int /*first key*/,
                           int /*keys*/, bool /*masked*/) {}

// The same value, about which the compiler knows nothing: what is computed from it inside a loop is not moved out of the
// loop, where it would only fill registers.
TGA_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

TGA_DEVICE int64_t multiply_wide(int x, int y) {
  int64_t product;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
  return product;
}

TGA_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
TGA_DEVICE double shuffle_xor(double x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
TGA_DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }
TGA_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
TGA_DEVICE int count_bits(uint32_t x) { return __popc(x); }

// A pointer to global memory from its bits, which alone would not tell the compiler what memory that is.
TGA_DEVICE const char* global_pointer(uint64_t bits) { return static_cast<const char*>(__cvta_global_to_generic(bits)); }

// Accesses of exactly the width of T, which has the alignment of its size.
template <class T>
TGA_DEVICE T load_global(const void* p) {
  return *static_cast<const T*>(p);
}
template <>
TGA_DEVICE Float4 load_global<Float4>(const void* p) {
  const float4 v = *static_cast<const float4*>(p);
  return {v.x, v.y, v.z, v.w};
}
template <>
TGA_DEVICE Word4 load_global<Word4>(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}
template <>
TGA_DEVICE Float2 load_global<Float2>(const void* p) {
  const float2 v = *static_cast<const float2*>(p);
  return {v.x, v.y};
}
template <class T>
TGA_DEVICE void store_global(void* p, T value) {
  *static_cast<T*>(p) = value;
}
template <>
TGA_DEVICE void store_global<Float2>(void* p, Float2 v) {
  *static_cast<float2*>(p) = make_float2(v.x, v.y);
}
template <>
TGA_DEVICE void store_global<Float4>(void* p, Float4 v) {
  *static_cast<float4*>(p) = make_float4(v.x, v.y, v.z, v.w);
}
template <>
TGA_DEVICE void store_global<Word4>(void* p, Word4 v) {
  *static_cast<uint4*>(p) = make_uint4(v.x, v.y, v.z, v.w);
}

template <class T>
TGA_DEVICE T load_shared(uint32_t address);
template <>
TGA_DEVICE uint32_t load_shared<uint32_t>(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
template <>
TGA_DEVICE float load_shared<float>(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
template <>
TGA_DEVICE double load_shared<double>(uint32_t address) {
  double v;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(v) : "r"(address) : "memory");
  return v;
}
template <>
TGA_DEVICE Float2 load_shared<Float2>(uint32_t address) {
  Float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
template <>
TGA_DEVICE Float4 load_shared<Float4>(uint32_t address) {
  Float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
template <>
TGA_DEVICE Word4 load_shared<Word4>(uint32_t address) {
  Word4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
TGA_DEVICE void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
TGA_DEVICE void store_shared(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
TGA_DEVICE void store_shared(uint32_t address, double v) {
  asm volatile("st.shared.f64 [%0], %1;" ::"r"(address), "d"(v) : "memory");
}
TGA_DEVICE void store_shared(uint32_t address, Float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
TGA_DEVICE void store_shared(uint32_t address, Word4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Launches kernel(params) on `blocks` blocks. A grid holds 2^31 - 1 blocks; params.first_block carries on past them.
template <class Params>
void launch(void (*kernel)(Params), Params params, int64_t blocks, int threads, size_t shared_bytes, void* stream,
            const char* name) {
  // 48 KiB is what every device grants without being asked.
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
  }
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  for (int64_t first = 0; first < blocks; first += kMaxBlocks) {
    params.first_block = first;
    const int64_t count = blocks - first < kMaxBlocks ? blocks - first : kMaxBlocks;
    void* arguments[] = {&params};
    check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(count)), dim3(threads), arguments, shared_bytes,
                           static_cast<cudaStream_t>(stream)),
          name);
  }
}

}  // namespace torch_gated_attn::cuda::dev

#endif
