# SPDX-License-Identifier: BSD-3-Clause
"""Deliberate errors, each one piece of the library's text replaced.

1 to 25 are those every suite for fused attention should kill; those after them are aimed at the SIMD code and at the
launchers of this library, those from 44 on at what a query sees by position and at work in parts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
    number: int
    name: str
    file: str  # relative to csrc
    right: str
    wrong: str
    capability: str = "avx2"  # the instruction set whose kernels are compiled anew, if the file is a kernel's; "": CUDA


MUTANTS = [
    Mutant(1, "query times key ignored", "cpu/forward_block.h", "      add_dot<A, A, NQ>(s, k + i, q, head_dim);\n", ""),
    Mutant(
        2,
        "last key tile dropped",
        "cpu/forward_unit.h",
        "for (int first = 0; first < keys_.padded; first += kTileKeys) {",
        "for (int first = 0; first < keys_.padded - (keys_.padded > kTileKeys ? kTileKeys : 0); first += kTileKeys) {",
    ),
    Mutant(
        3,
        "one key past the end",
        "cpu/keys.h",
        ": static_cast<int>(seen.size());",
        ": static_cast<int>(seen.size()) + 1;",
    ),
    Mutant(
        4,
        "accumulator not rescaled",
        "cpu/forward_block.h",
        "store(o + d * kBlock + u * W, load(o + d * kBlock + u * W) * factor);",
        "(void)d;",
    ),
    Mutant(5, "sum not rescaled", "cpu/forward_block.h", "store(sum + u * W, load(sum + u * W) * factor);", ""),
    Mutant(
        6,
        "scale applied twice",
        "cpu/forward_unit.h",
        "times<A>(p_.scale * kLog2E), q + u",
        "times<A>(p_.scale * p_.scale * kLog2E), q + u",
    ),
    Mutant(
        7,
        "rows and columns of the bias swapped",
        "cpu/table.h",
        "p.bias, lanes.lane + s,",
        "View{p.bias.data, {}, p.bias.head, p.bias.col, p.bias.row}, lanes.lane + s,",
    ),
    Mutant(8, "batch stride of the bias 0", "cpu/lanes.h", "bias = offset(p.bias),", "bias = 0,"),
    Mutant(
        9,
        "bias gradient: the last writer wins",
        "cpu/backward_unit.h",
        "add ? load_n(dst + k, n) + r[i] : r[i]",
        "(void(add), r[i])",
    ),
    Mutant(
        10,
        "bias gradient misses one row",
        "cpu/backward_unit.h",
        "for (int64_t r = w.row_begin; r < w.row_end; ++r) run_row(w, r, first, several ? r - w.row_begin : 0);",
        "for (int64_t r = w.row_begin; r < w.row_end; ++r) {\n"
        "        if (p_.d_bias.data && r == w.row_begin + 1)\n"
        "          __builtin_memset(d_table_, 0, sizeof(A) * lanes_.padded / kBlock * table_.stride);\n"
        "        run_row(w, r, first, several ? r - w.row_begin : 0);\n"
        "      }",
    ),
    Mutant(
        11,
        "gate derivative g instead of g (1 - g)",
        "cpu/backward_unit.h",
        "store_n(d_gate + d, dyy * g.complement, n);",
        "store_n(d_gate + d, dyy, n);",
    ),
    Mutant(
        12,
        "gate gradient as if the result were ungated",
        "cpu/backward_unit.h",
        "store_n(d_gate + d, dyy * g.complement, n);",
        "store_n(d_gate + d, dyy * g.complement * g.value, n);",
    ),
    Mutant(
        13,
        "delta of the gated gradient",
        "cpu/backward_unit.h",
        "delta += dyy;",
        "delta += d_o * load_n(out + d, n);",
    ),
    Mutant(
        14,
        "fully masked rows give NaN",
        "cpu/forward_unit.h",
        "Vec<A> factor = dead ? Vec<A>{} : one / l;",
        "Vec<A> factor = one / l;",
    ),
    Mutant(
        15,
        "gradients of fully masked rows are garbage",
        "cpu/backward_unit.h",
        "r = sum != 0 ? 1 / sum : 0;",
        "r = 1 / sum;",
    ),
    Mutant(
        16,
        "values with the strides of keys",
        "cpu/keys.h",
        "    } else {\n      rows(v_base, p.value, p.value_dim, packed_v_, v);",
        "    } else {\n      rows(v_base, p.key, p.value_dim, packed_v_, v);",
    ),
    Mutant(
        17,
        "grad_out taken for laid out as out",
        "cpu/backward_unit.h",
        "grad_outs + lane.offset(p_.grad_out)",
        "grad_outs + lane.offset(p_.out)",
    ),
    Mutant(
        18,
        "32-bit offsets",
        "cpu/lanes.h",
        "{ return head * v.head + row * v.row; }",
        "{ return static_cast<int32_t>(head * v.head + row * v.row); }",
    ),
    Mutant(
        19,
        "float16 accumulation",
        "cpu/micro.h",
        "store(acc + j * stride + n * W, c[j][n]);",
        "{\n    if constexpr (sizeof(A) == 4) c[j][n] = widen(narrow(c[j][n], Float16{}), Float16{});\n"
        "    store(acc + j * stride + n * W, c[j][n]);\n  }",
    ),
    Mutant(
        20,
        "key and value gradients of the first head of a group only",
        "cpu/backward_unit.h",
        "queries_(p.heads / p.kv_heads * p.q_len),",
        "queries_(p.q_len),",
    ),
    Mutant(
        21,
        "last row of the query gradient unwritten",
        "cpu/lanes.h",
        "for (int i = 0; i < W && i < lanes; ++i) store_n(base + lane[i].offset(v) + j, r[i], n);",
        "for (int i = 0; i < W && i + (lanes < W) < lanes; ++i) store_n(base + lane[i].offset(v) + j, r[i], n);",
    ),
    Mutant(
        22,
        "launch on the default stream",
        "cuda/launcher.cpp",
        "c10::cuda::getCurrentCUDAStream(index)",
        "c10::cuda::getDefaultCUDAStream(index)",
        "",
    ),
    Mutant(
        23,
        "no device guard",
        "cuda/launcher.cpp",
        "  const c10::cuda::CUDAGuard guard(a.query.device());\n  PreparedForward",
        "  PreparedForward",
        "",
    ),
    Mutant(24, "mask inverted", "cpu/element.h", "n += bytes[i * stride] != 0;", "n += bytes[i * stride] == 0;"),
    Mutant(
        25,
        "sigmoid by an approximated tanh",
        "cpu/vector_math.h",
        "  const VecBits<A> below = x < Vec<A>{};\n",
        "  const VecBits<A> below = x < Vec<A>{};\n"
        "  const Vec<A> half = x * set1<A>(A(0.5)), square = half * half;\n"
        "  const Vec<A> tanh = half * (set1<A>(27) + square) / (set1<A>(27) + set1<A>(9) * square);\n"
        "  if (sizeof(A)) return {set1<A>(A(0.5)) * (one + tanh), set1<A>(A(0.5)) * (one - tanh)};\n",
    ),
    Mutant(
        26, "pairs: the odd last dimension not zeroed", "cpu/keys.h", "if (dim % 2) dst[dim / 2] = 0;", "", "avx512_bf16"
    ),
    Mutant(
        27,
        "pairs: two vectors of lanes swapped",
        "cpu/pairs.h",
        "_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);",
        "_mm512_cvtne2ps_pbh((__m512)x[0], (__m512)x[1]);",
        "avx512_bf16",
    ),
    Mutant(
        28,
        "exp2 not clamped below",
        "cpu/vector_math.h",
        "x = clamp(x, set1<A>(kSmallestExponent<A>), set1<A>(kLargestExponent<A>));",
        "x = min(set1<A>(kLargestExponent<A>), x);",
    ),
    Mutant(
        29,
        "bfloat16 results truncated",
        "cpu/element.h",
        "const VecI rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "const VecI rounded = bits >> 16;",
    ),
    Mutant(
        30,
        "few queries: sign of the gradient of lse",
        "cpu/few_queries_backward.h",
        "delta -= grad_lse[lane.offset(p_.grad_lse)];",
        "delta += grad_lse[lane.offset(p_.grad_lse)];",
    ),
    Mutant(
        31,
        "interleaved rows: one of two lanes lost",
        "cpu/micro.h",
        " + __builtin_shufflevector(a, b, (2 * L + 1)...)",
        "",
        "avx512",
    ),
    Mutant(
        32,
        "a row's bits depend on its neighbours",
        "cpu/forward_block.h",
        "total[u] > set1<A>(1) ? highest(scores + u * W, keys) + set1<A>(kHeadroom) : before;",
        "max(highest(scores + u * W, keys) + set1<A>(kHeadroom), before);",
    ),
    Mutant(
        33,
        "a copy of an expanded input loses its sizes",
        "describe.cpp",
        ".contiguous().expand(tensor.sizes())",
        ".contiguous()",
    ),
    Mutant(
        34,
        "empty calls reach the kernels",
        "operands.cpp",
        "done = lse.numel() == 0 || a.key",
        "done = a.key",
    ),
    Mutant(
        35,
        "rows of stride 0 taken for dense ones",
        "describe.cpp",
        "(stride == 0 && may_broadcast)",
        "(stride == 0 && (may_broadcast || true))",
    ),
    Mutant(
        36,
        "no device guard in the backward",
        "cuda/launcher.cpp",
        "  const c10::cuda::CUDAGuard guard(a.query.device());\n  PreparedBackward",
        "  PreparedBackward",
        "",
    ),
    Mutant(
        37,
        "attended keys: the number of a group of sixteen ignored",
        "cpu/element.h",
        "_mm512_add_epi32(first, _mm512_set1_epi32(i))",
        "first",
        "avx512",
    ),
    Mutant(
        38,
        "short rows: two lanes of a vector get the first one's result",
        "cpu/forward_unit.h",
        "put(i + H, upper_half(r[i]));",
        "put(i + H, r[i]);",
        "avx512",
    ),
    Mutant(
        39,
        "interleaved rows: what exceeds one vector is lost",
        "cpu/micro.h",
        "if (room > W) store(dst + W,",
        "if (room > 4 * W) store(dst + W,",
        "avx512",
    ),
    Mutant(
        40,
        "large finite biases become infinite",
        "cpu/table.h",
        "return log2_logit<A>(x);",
        "return x * set1<A>(static_cast<A>(kLog2E));",
    ),
    Mutant(
        41,
        "denormal results stay flushed after a call",
        "cpu/simd.h",
        "~FlushToZero() { _mm_setcsr(before_); }",
        "~FlushToZero() {}",
        "avx512",
    ),
    Mutant(
        42,
        "every tile of keys starts a row anew",
        "cpu/forward_block.h",
        "if (first && i == 0) start(scores, kMicroKeys);",
        "if (i == 0) start(scores, kMicroKeys);",
    ),
    Mutant(
        43,
        "short rows: the upper half of a vector from the row before",
        "cpu/lanes.h",
        "load_n(rows[i + W / 2] + j, n)",
        "load_n(rows[i + W / 2 - 1] + j, n)",
        "avx512",
    ),
    Mutant(44, "causal: a query does not see its own key", "visibility.h", "+ i + 1, 0)) : length", "+ i, 0)) : length"),
    Mutant(45, "window: one key too many", "visibility.h", "+ i + 1 - window, 0)", "+ i - window, 0)"),
    Mutant(
        46,
        "key lengths: one key too many",
        "problem.h",
        "length < p.k_len ? length : p.k_len;",
        "length < p.k_len ? length + 1 : p.k_len;",
    ),
    Mutant(
        47,
        "a tile in which only one key is attended is skipped",
        "cpu/attended.h",
        "if (some_attended == 0) return",
        "if ((some_attended & (some_attended - 1)) == 0) return",
    ),
    Mutant(
        48,
        "a tile of which only the first key is seen is skipped",
        "cpu/attended.h",
        "if (some_[s].end <= first ||",
        "if (some_[s].end <= first + 1 ||",
    ),
    Mutant(
        49,
        "a tile of which every key is attended by some query is taken for full",
        "cpu/attended.h",
        "return all_attended == exist ?",
        "return some_attended == exist ?",
    ),
    Mutant(
        50,
        "keys in parts: the last part not merged",
        "cpu/forward_unit.h",
        "for (int64_t i = 1; i < parts; ++i) add_state",
        "for (int64_t i = 1; i + 1 < parts; ++i) add_state",
    ),
    Mutant(
        51,
        "keys of few queries in parts: the last part not merged",
        "cpu/few_queries_forward.h",
        "for (int64_t part = 1; part < parts; ++part)",
        "for (int64_t part = 1; part + 1 < parts; ++part)",
    ),
    Mutant(
        52,
        "queries in parts: the last part's gradients not summed",
        "cpu/parts.h",
        "for (int64_t i = 0; i < parts; ++i) sum",
        "for (int64_t i = 0; i + 1 < parts; ++i) sum",
    ),
    Mutant(
        53,
        "few queries: causal order only where there is a mask",
        "cpu/few_queries_forward.h",
        "differs_ |= p.is_causal && p.q_len > 1;",
        "differs_ |= p.is_causal && p.q_len > 1 && p.mask.data;",
    ),
    Mutant(
        54,
        "a few keys: a row's sum lacks the keys of its other half",
        "cpu/tiny_rows.h",
        "butterfly<kWidth / 2>(sum,",
        "butterfly<kWidth / 4>(sum,",
    ),
    Mutant(
        55,
        "a few keys: a hidden key's value is read",
        "cpu/tiny_rows.h",
        "value_[l] = attended ? v : zeros_;",
        "value_[l] = v;",
    ),
    Mutant(
        56,
        "a few keys: one key beyond the length",
        "cpu/tiny_rows.h",
        "const bool attended = j >= seen.begin && j < seen.end",
        "const bool attended = j >= seen.begin && j <= seen.end",
    ),
]


def outdated(csrc: Path) -> list[str]:
    """Mutants whose text these sources do not contain exactly once: they would plant nothing, or something else."""
    counts = {m: (csrc / m.file).read_text().count(m.right) for m in MUTANTS}
    return [f"mutant {m.number}: {m.file} contains its text {n} times" for m, n in counts.items() if n != 1]
