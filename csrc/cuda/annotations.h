// SPDX-License-Identifier: BSD-3-Clause
//
// Function annotations, empty for host compilers: headers of plain structs serve host and device.
#pragma once

#ifdef __CUDACC__
#define TGA_DEVICE __device__ __forceinline__
#define TGA_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define TGA_PARAMS const __grid_constant__
#define TGA_UNROLL _Pragma("unroll")
#define TGA_ROLLED _Pragma("unroll 1")
#else
#define TGA_DEVICE inline
#define TGA_KERNEL(threads, blocks_per_sm) inline void
#define TGA_PARAMS const
#define TGA_UNROLL
#define TGA_ROLLED
#endif
