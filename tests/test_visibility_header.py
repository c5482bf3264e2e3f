# SPDX-License-Identifier: BSD-3-Clause
"""csrc/visibility.h against loops over the definition, for every small call: compiled by itself, without PyTorch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX", "g++")
CSRC = Path(__file__).resolve().parents[1] / "csrc"

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "visibility.h"
using namespace torch_gated_attn;

template <class Int> struct Check {
  Visibility<Int> v;
  long calls = 0;

  // The sentences of the documentation.
  bool seen(Int i, Int j) const {
    const long long position = (long long)v.k_len - v.q_len + i;
    if (v.causal && j > position) return false;
    if (v.causal && v.window > 0 && position - j >= v.window) return false;
    return j < v.length;
  }
  void require(bool right, const char* what, Int a, Int b, Int c, Int d) {
    ++calls;
    if (right) return;
    std::printf("%s: q_len %lld, k_len %lld, length %lld, window %lld, causal %d, arguments %lld %lld %lld %lld\n", what,
                (long long)v.q_len, (long long)v.k_len, (long long)v.length, (long long)v.window, v.causal, (long long)a,
                (long long)b, (long long)c, (long long)d);
    std::exit(1);
  }
  // Whether the range holds exactly the indices for which f is true; an empty one may lie anywhere.
  template <class F> static bool exactly(Range<Int> range, Int size, F f) {
    if (!range.empty() && (range.begin < 0 || range.end > size)) return false;
    for (Int i = 0; i < size; ++i)
      if ((i >= range.begin && i < range.end) != f(i)) return false;
    return true;
  }
  void run() {
    const Int q = v.q_len, k = v.k_len;
    for (Int i = 0; i < q; ++i) {
      require(exactly(v.keys_of(i), k, [&](Int j) { return seen(i, j); }), "keys_of", i, 0, 0, 0);
      for (Int j = 0; j < k; ++j) require(v.sees(i, j) == seen(i, j), "sees", i, j, 0, 0);
    }
    for (Int b = 0; b <= q; ++b)
      for (Int e = b; e <= q; ++e) {
        const auto some = [&](Int j) { for (Int i = b; i < e; ++i) if (seen(i, j)) return true; return false; };
        const auto all = [&](Int j) { for (Int i = b; i < e; ++i) if (!seen(i, j)) return false; return b < e; };
        require(exactly(v.keys_of(Range<Int>{b, e}), k, some), "keys_of(range)", b, e, 0, 0);
        require(exactly(v.keys_of_all({b, e}), k, all), "keys_of_all", b, e, 0, 0);
        for (Int f = 0; f <= k && b < e; ++f)
          for (Int l = f + 1; l <= k; ++l) {
            bool any = false, every = true;
            for (Int j = f; j < l; ++j) any |= some(j), every &= all(j);
            const Cover expected = !any ? Cover::kEmpty : every ? Cover::kFull : Cover::kMixed;
            require(v.cover({b, e}, {f, l}) == expected, "cover", b, e, f, l);
          }
      }
    for (Int f = 0; f <= k; ++f)
      for (Int l = f; l <= k; ++l)
        require(exactly(v.queries_of({f, l}), q, [&](Int i) {
          for (Int j = f; j < l; ++j) if (seen(i, j)) return true;
          return false;
        }), "queries_of", f, l, 0, 0);
  }
};

template <class Int> long all(Int largest, Int huge) {
  Check<Int> check;
  for (check.v.q_len = 1; check.v.q_len <= largest; ++check.v.q_len)
    for (check.v.k_len = 1; check.v.k_len <= largest; ++check.v.k_len)
      for (check.v.length = 0; check.v.length <= check.v.k_len; ++check.v.length) {
        check.v.causal = false, check.v.window = 0;
        check.run();
        check.v.causal = true;
        for (Int window = 0; window <= largest + 2; ++window) {
          check.v.window = window == largest + 2 ? huge : window;
          check.run();
        }
      }
  return check.calls;
}

int main() {
  const Range<int> a{2, 7}, b{5, 9};
  if (a.within(b).begin != 5 || a.within(b).end != 7 || a.within(b).size() != 2 || Range<int>{3, 1}.size() != 0) return 1;
  std::printf("%ld calls\n", all<int32_t>(7, 2147483647) + all<int64_t>(7, 9223372036854775807));
}
"""


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is missing")
def test_ranges_and_covers_are_what_each_pair_says(tmp_path):
    """Every length up to 7, window, key length, range and tile; an overflow would end the program."""
    source, program = tmp_path / "check.cpp", tmp_path / "check"
    source.write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    compiled = subprocess.run([COMPILER, *flags, f"-I{CSRC}", source, "-o", program], capture_output=True, text=True)
    if "cannot find" in compiled.stderr:  # a compiler without that sanitizer's library
        subprocess.run([COMPILER, *flags[:2], f"-I{CSRC}", source, "-o", program], check=True)
    else:
        assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 10**6
