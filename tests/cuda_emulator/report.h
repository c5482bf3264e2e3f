// SPDX-License-Identifier: BSD-3-Clause
//
// What the emulator found wrong, and what it counted.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace emulator {

// Plain counters, read through ctypes: keep the order of tests/test_cuda_emulator.py.
struct Report {
  int64_t races = 0;           // two warps touch a shared word, one of them writing, with no barrier between
  int64_t uninitialised = 0;   // shared memory read before it was written
  int64_t out_of_bounds = 0;   // shared or global access outside what was given, or a write to an input
  int64_t misaligned = 0;      // an access whose address is no multiple of its width
  int64_t divergent = 0;       // lanes of a warp that meet in different collectives
  int64_t bank_conflicts = 0;  // extra shared memory passes of ldmatrix
  int64_t unrounded = 0;       // operands of TF32 products that are no TF32 numbers
  int64_t mma = 0, ldmatrix = 0, exp2 = 0;
};

inline Report report;
inline std::string first_finding;

inline void note(int64_t& counter, const char* what, uint64_t address, int thread) {
  if (counter++ == 0 && first_finding.empty()) {
    char text[160];
    std::snprintf(text, sizeof(text), "%s at %#llx by thread %d", what, static_cast<unsigned long long>(address), thread);
    first_finding = text;
  }
}

}  // namespace emulator
