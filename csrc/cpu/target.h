// SPDX-License-Identifier: BSD-3-Clause
//
// TGA_TARGET_BEGIN("avx2,fma"): the functions that follow, until TGA_TARGET_END, are compiled for these features of the
// processor. GCC and clang spell it differently, and each ignores the other's spelling.
#pragma once

#define TGA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TGA_TARGET_BEGIN(features) TGA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TGA_TARGET_END TGA_PRAGMA(clang attribute pop)
#else
// To the end of the file: GCC compiles templates there, with the options of that place.
#define TGA_TARGET_BEGIN(features) TGA_PRAGMA(GCC target(features))
#define TGA_TARGET_END
#endif
