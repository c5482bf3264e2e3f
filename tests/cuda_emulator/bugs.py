# SPDX-License-Identifier: BSD-3-Clause
"""Deliberate bugs that the emulator or the tolerance rule must catch: each replaces one piece of a kernel's text."""

import dataclasses
import shutil

from . import build


@dataclasses.dataclass
class Bug:
    name: str
    file: str
    right: str
    wrong: str
    masked: bool = True  # the inputs that show it have a mask
    low: bool = False  # they have rows of very low logits
    dtype: str = "bf16"  # of the kernels that it reaches
    changes: dict = dataclasses.field(default_factory=dict)  # other arguments of draw() that show it

    def plant(self, folder):
        """A copy of csrc with this bug in it; the path of its cuda folder."""
        root = folder / "csrc"
        shutil.copytree(build.CUDA, root / "cuda")
        for header in ("problem.h", "visibility.h"):
            shutil.copy(build.CUDA.parent / header, root)
        path = root / "cuda" / self.file
        text = path.read_text()
        assert self.right in text, f"{self.file} no longer contains what the bug {self.name!r} replaces"
        path.write_text(text.replace(self.right, self.wrong, 1))
        return root / "cuda"


BUGS = [
    Bug(
        "missing barrier",
        "forward.cuh",
        "dev::wait_copies<T::kStages - 2>();\n        dev::sync_block();",
        "dev::wait_copies<T::kStages - 2>();",
    ),
    Bug("wait off by one", "forward.cuh", "dev::wait_copies<T::kStages - 2>();", "dev::wait_copies<T::kStages - 1>();"),
    Bug("wrong swizzle", "layout.cuh", "((chunk ^ ((row >> 2) & 1)) << 4)", "(chunk << 4)"),
    Bug("dropped tail", "tile_plan.cuh", "(keys.end - panel + kBlock - 1) / kBlock", "(keys.end - panel) / kBlock"),
    Bug("accumulator not rescaled", "softmax.cuh", "acc[m][n][2] *= second;", ""),
    Bug("sum not rescaled", "softmax.cuh", "sum[m][1] *= second;", ""),
    Bug("mask ignored", "logits.cuh", "if (!attended) {", "if (false) {"),
    Bug(
        "teams not rotated over full tiles",
        "backward_query.cuh",
        "int turn = T::kStrip ? team : 0;",
        "int turn = 0;",
        masked=False,
    ),
    Bug(
        "teams not rotated over mixed tiles", "backward_query.cuh", "turn = full + (T::kStrip ? team : 0);", "turn = full;"
    ),
    Bug(
        "strip read before the last step",
        "backward_query.cuh",
        "  if constexpr (T::kStrip) {\n    dev::sync_block();",
        "  if constexpr (T::kStrip) {",
    ),
    Bug("delta without the sum over lanes", "prepare.cuh", "delta += dev::shuffle_xor(delta, lanes);", ""),
    Bug(
        "shift of the wrong query",
        "backward_key.cuh",
        "i % 2 == 0 ? shift.x : shift.y",
        "i / 2 == 0 ? shift.x : shift.y",
    ),
    Bug(
        "read past the end",
        "fragments.cuh",
        "fragment[step][half * 2 + i] = row < rows ?",
        "fragment[step][half * 2 + i] = row <= rows ?",
    ),
    Bug(
        "exponent by a fused multiply-add",
        "logits.cuh",
        "dev::exp2(logit<T>(score, factor) - shift)",
        "dev::exp2(T::kGeneral ? score - shift : fmaf(score, factor, -shift))",
        low=True,
    ),
    Bug(
        "low rows overlooked, keys",
        "backward_key.cuh",
        "dev::sync_block_any(!T::kLogits && ring.has_low_row())",
        "dev::sync_block_any(false)",
        low=True,
    ),
    Bug(
        "low rows overlooked, queries",
        "backward_query.cuh",
        "T::kGeneral || low ||",
        "T::kGeneral ||",
        masked=False,
        low=True,
    ),
    Bug(
        "off by one at the diagonal",
        "sight.cuh",
        "visibility(p, p.k_len).keys_of(query)",
        "visibility(p, p.k_len).keys_of(query + 1)",
        masked=False,
        changes={"is_causal": True},
    ),
    Bug(
        "off by one at the diagonal, keys",
        "sight.cuh",
        "queries_of({key, key + 1})",
        "queries_of({key > 0 ? key - 1 : 0, key + 1})",
        masked=False,
        changes={"is_causal": True},
    ),
    Bug(
        "off by one at the window's end",
        "../visibility.h",
        "greatest(k_len - q_len + i + 1 - window, 0)",
        "greatest(k_len - q_len + i + 2 - window, 0)",
        masked=False,
        changes={"is_causal": True, "window": 40},
    ),
    Bug(
        "off by one at the length",
        "sight.cuh",
        "length < p.k_len ? static_cast<int>(length) : p.k_len",
        "length < p.k_len ? static_cast<int>(length) + 1 : p.k_len",
        masked=False,
        changes={"key_lengths": [100, 0, 150, 149, 1]},
    ),
    Bug(
        "a tile with one attended pair skipped",
        "tile_plan.cuh",
        "some == 0 ? Cover::kEmpty",
        "dev::count_bits(some) <= 1 ? Cover::kEmpty",
        changes={"mask": "one pair"},
    ),
    Bug(
        "a tile with one attended pair skipped, keys",
        "query_plan.cuh",
        "some = some || votes.some != 0",
        "some = some || dev::count_bits(votes.some) > 1",
        changes={"mask": "one pair"},
    ),
    Bug(
        "one product of parts left out",
        "tf32.cuh",
        "      dev::mma_tf32(cross, big, b0.small, b1.small, cross);\n    }\n",
        "    }\n",
        dtype="fp32",
    ),
    Bug(
        "small part of the probabilities left out",
        "tf32.cuh",
        "dev::mma_tf32(sum[m], small[m][e], b0.big, b1.big, sum[m]);",
        "",
        dtype="fp32",
    ),
    Bug(
        "a number passed on unsplit",
        "tf32.cuh",
        "return {big, dev::as_word(dev::as_float(word) - dev::as_float(big)) & ~kBelow};",
        "return {word, 0};",
        dtype="fp32",
    ),
    Bug(
        "rows of values in the order of the columns of a fragment",
        "tf32.cuh",
        "swizzled<T::kRowBytes>(2 * lane.pair + 1,",
        "swizzled<T::kRowBytes>(lane.pair + 4,",
        dtype="fp32",
    ),
    Bug(
        "bias scaled otherwise in the backward",
        "reordered_bias.cuh",
        "c[2 * i] = dev::multiply_toward_zero(pair.x, inverse_scale);",
        "c[2 * i] = pair.x * (inverse_scale * 0.99999f);",
        low=True,
    ),
]
