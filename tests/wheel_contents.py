# SPDX-License-Identifier: BSD-3-Clause
"""What a wheel must hold, and what not: `python tests/wheel_contents.py dist/*.whl` prints what is wrong."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

# The library finds torch's own libraries in the process that imports it.
BUNDLED = re.compile(r"lib(torch|c10|cudart|cublas|cudnn|gomp|stdc\+\+)|\.libs/")
FOREIGN = re.compile(r"(^|/)(tests?|benchmarks|examples|docs|csrc|build)/|\.(cpp|cu|cuh|h|o|pyc)$")
WANTED = {
    "py.typed",
    "_C.pyi",
    "_bench/workloads.json",
    "cli/app.py",
    "distributed/__init__.py",
    "integrations/__init__.py",
}
# The kernels of one instruction set are about 1 MiB, those of one CUDA architecture, compressed, some 5.
LARGEST_MIB = {"cpu": 20, "cuda": 80}


def problems(wheel: Path, kind: str = "cpu") -> list[str]:
    """One sentence for each thing that is wrong."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found = [f"{name} is a library of somebody else" for name in names if BUNDLED.search(name)]
    found += [f"{name} does not belong into a wheel" for name in names if FOREIGN.search(name)]
    tops = {name.split("/")[0] for name in names}
    found += [f"{top} is installed beside the package" for top in tops if not top.startswith("torch_gated_attn")]
    libraries = [name for name in names if name.endswith(".so")]
    if len(libraries) != 1 or not libraries[0].startswith("torch_gated_attn/_C."):
        found.append(f"the wheel must have one library, torch_gated_attn/_C.*.so, but has {libraries}")
    found += [f"torch_gated_attn/{name} is missing" for name in sorted(WANTED) if f"torch_gated_attn/{name}" not in names]
    if not any(name.endswith("licenses/LICENSE") for name in names):
        found.append("the licence is missing")
    if "-none-" in wheel.name or not re.search(r"-cp\d+-cp\d+-", wheel.name):
        found.append(f"{wheel.name} must be tagged with the Python it was built for")
    size = wheel.stat().st_size / 2**20
    if size > LARGEST_MIB[kind]:
        found.append(f"the wheel has {size:.0f} MiB, more than {LARGEST_MIB[kind]}")
    return found


if __name__ == "__main__":
    # A wheel for others says in its name whether it has CUDA kernels.
    wrong = [text for name in sys.argv[1:] for text in problems(Path(name), "cpu" if ".cpu-" in name else "cuda")]
    print("\n".join(wrong) or f"{', '.join(sys.argv[1:])}: one library, nothing of torch, no tests")
    raise SystemExit(bool(wrong) or len(sys.argv) < 2)
