# SPDX-License-Identifier: BSD-3-Clause
"""Deliberate errors in the PTX of a kernel that a run must show: each changes one instruction."""

from __future__ import annotations

import dataclasses
import re
import string

from .parser import Kernel


def pattern(instructions: str) -> str:
    """Of instructions in which $a stands for an operand, the same wherever it stands, and $A for several."""
    seen: set[str] = set()

    def group(found: re.Match) -> str:
        name = found[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>[^][{{}};{', ' if name.islower() else ''}]+)"

    return re.sub(r"\\\$([a-zA-Z])", group, re.escape(instructions)).replace(r"\ ", r"\s+")


@dataclasses.dataclass(frozen=True)
class Mutation:
    name: str
    kernel: str  # its variant, as cuda_emulator.kernels calls it
    right: str
    wrong: str
    after: str = ""  # the first place behind this text is changed
    number: int = 0  # or a later one; -1: the last
    head_dim: int = 16  # 0: the kernel is for any

    def plant(self, kernel: Kernel) -> Kernel:
        places = list(re.compile(pattern(self.right)).finditer(kernel.body, kernel.body.index(self.after)))
        assert places, f"{kernel.name} no longer contains what the mutation {self.name!r} replaces"
        found = places[self.number]
        wrong = string.Template(self.wrong).substitute(found.groupdict())
        return dataclasses.replace(kernel, body=kernel.body[: found.start()] + wrong + kernel.body[found.end() :])


FORWARD, QUERY, KEY = "forward, half bias, shared", "backward query, half bias, strip", "backward key, half bias"
PRODUCT, WAIT = "mma.sync", "cp.async.wait_group"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
LEAVES = "setp.ge.s32 $p, $a, $b; cvt.s64.s32 $c, $a;"  # a key past the end is not stored
MUTATIONS = [
    Mutation("wait off by one", FORWARD, "cp.async.wait_group 1;", "cp.async.wait_group 2;"),
    Mutation("wait left out", QUERY, "cp.async.wait_group 0;", ""),
    Mutation("copies not committed", FORWARD, "cp.async.commit_group;", ""),
    Mutation("copies of what is masked", FORWARD, "setp.eq.u32 ignore,", "setp.ne.u32 ignore,"),
    Mutation("barrier left out", FORWARD, "bar.sync 0;", "", after=WAIT),
    Mutation("barrier left out, queries", QUERY, "bar.sync 0;", "", after=WAIT),
    Mutation("barrier left out, keys", KEY, "bar.red.or.pred $p, 0, $q;", "mov.pred $p, $q;", after=WAIT),
    Mutation("barrier before the strip is read left out", QUERY, "bar.sync 0;", "", number=-1),
    Mutation("barrier of a warp left out", FORWARD, "bar.warp.sync -1;", "", after=PRODUCT, number=1),
    Mutation("matrix transposed", FORWARD, "m8n8.x4.shared", "m8n8.x4.trans.shared"),
    Mutation("matrix not transposed", FORWARD, "m8n8.x4.trans.shared", "m8n8.x4.shared"),
    Mutation("bias not transposed", QUERY, "movmatrix.sync.aligned.m8n8.trans.b16", "mov.b32"),
    Mutation("offset of a matrix", FORWARD, "m8n8.x4.shared.b16 {$D}, [$a]", "m8n8.x4.shared.b16 {$D}, [$a+16]"),
    Mutation("offset of a vector", KEY, "ld.shared.v4.f32 {$D}, [$a]", "ld.shared.v4.f32 {$D}, [$a+8]"),
    Mutation("offset in the strip", QUERY, "st.shared.v4.f32 [$a]", "st.shared.v4.f32 [$a+16]", after=PRODUCT),
    Mutation("distance of a shuffle", FORWARD, "shfl.sync.bfly.b32 $d, $a, $b,", "shfl.sync.bfly.b32 $d, $a, 4,"),
    Mutation("distance of a shuffle, delta", "prepare rows", "bfly.b32 $d, $a, $b,", "bfly.b32 $d, $a, 2,"),
    Mutation("left factor", FORWARD, f"{MMA} {{$D}}, {{$a, $b, $c, $d}}", f"{MMA} {{$D}}, {{$a, $c, $b, $d}}"),
    Mutation("right factor", KEY, f"{MMA} {{$D}}, {{$A}}, {{$a, $b}}", f"{MMA} {{$D}}, {{$A}}, {{$b, $a}}"),
    Mutation("accumulator", QUERY, "{$a, $b}, {$c, $d, $e, $f};", "{$a, $b}, {$d, $c, $e, $f};", after=MMA),
    Mutation("halves of a pair", FORWARD, "cvt.rn.bf16x2.f32 $d, $a, $b;", "cvt.rn.bf16x2.f32 $d, $b, $a;"),
    Mutation("sign of an exponent", FORWARD, "sub.f32 $d, $a, $b;", "sub.f32 $d, $b, $a;", after=PRODUCT),
    Mutation("predicate of a branch", FORWARD, "@$p bra", "@!$p bra", after=PRODUCT),
    Mutation("comparison with its equal, rows", QUERY, "setp.ge.s64", "setp.gt.s64", number=-1),
    Mutation("comparison with its equal, keys", KEY, LEAVES, LEAVES.replace("ge", "gt", 1), number=-2),
    Mutation("reordered bias", "transpose bias, half bias", "v4.u32 [$t], {$a, $b,", "v4.u32 [$t], {$b, $a,", head_dim=0),
]
