# SPDX-License-Identifier: BSD-3-Clause
"""The CPU kernels without PyTorch: random calls beside protected pages, under sanitizers, valgrind and own threads.

TORCH_GATED_ATTN_FUZZ_CALLS=N draws N calls instead of a few hundred; TORCH_GATED_ATTN_FUZZ_SEED is the first one's seed.
TORCH_GATED_ATTN_FUZZ_SECONDS=N lets libFuzzer run N seconds on every instruction set instead of a few on two.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from core.build import ARM_SETS, CSRC, HERE, SETS, build

COMPILER = os.environ.get("CXX", "g++")
CLANG = next(filter(shutil.which, ["clang++", *(f"clang++-{version}" for version in range(22, 15, -1))]), "clang++")
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = next(filter(shutil.which, ["qemu-aarch64-static", "qemu-aarch64"]), "qemu-aarch64")
SEED = int(os.environ.get("TORCH_GATED_ATTN_FUZZ_SEED", "1"))
CALLS = os.environ.get("TORCH_GATED_ATTN_FUZZ_CALLS")
SECONDS = os.environ.get("TORCH_GATED_ATTN_FUZZ_SECONDS")
ADDRESS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREAD = ("-O1", "-fsanitize=thread")
PLAIN = ("-O1",)
FUZZER = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined", "-DTORCH_GATED_ATTN_LIBFUZZER")
MAIN = "int main() { return 0; }\n"
FUZZED = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"{COMPILER}, which compiles the core here, is missing"
)


def sanitizer_is_missing(flags: Sequence[str], folder: Path, compiler: str = COMPILER, program: str = MAIN) -> bool:
    source = folder / "empty.cpp"
    source.write_text(program)
    command = [compiler, *flags, str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def run(command: Sequence[object], calls: int, **environment: str) -> None:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=900 if CALLS is None else None,
        check=False,
        env={**os.environ, **environment},
    )
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    said = f"exit code {done.returncode}; the call's own line stands above the report:\n{done.stderr[-6000:]}"
    assert done.returncode == 0, said
    assert f"{calls} calls" in done.stdout


def calls_or(few: int) -> int:
    return few if CALLS is None else int(CALLS)


@pytest.mark.parametrize("capability", SETS)
def test_random_calls_beside_protected_pages(capability):
    """Inputs and outputs touch protected pages; outputs are NaN first; their gaps and the inputs stay as they were."""
    calls = calls_or(300)
    run([build(COMPILER, PLAIN), capability, SEED, calls, 1], calls)


@pytest.mark.skipif(shutil.which(CLANG) is None, reason=f"{CLANG} is missing")
@pytest.mark.parametrize("capability", SETS)
def test_clang_compiles_without_warnings(capability):
    calls = calls_or(100)
    run([build(CLANG, PLAIN), capability, SEED + 50_000, calls, 1], calls)


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS}, which compiles for aarch64, is missing")
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR}, which runs aarch64 programs, is missing")
@pytest.mark.parametrize("capability", ARM_SETS)
def test_aarch64_in_an_emulator(capability):
    """A call takes some hundred times as long as on a processor, so they are few and small."""
    calls = calls_or(20)
    program = build(CROSS, (*PLAIN, "-static"), ARM_SETS)
    run([EMULATOR, "-cpu", "max", program, capability, SEED + 60_000, calls, 2, 24], calls)


def test_sanitizers_see_every_masked_access():
    masked = re.compile(r"\b_mm\d+_maskz?_(?:load|store)\w+")
    used = {name for path in (CSRC / "cpu").iterdir() for name in masked.findall(path.read_text())}
    assert used == set(masked.findall((HERE / "instrumented.h").read_text()))


@pytest.mark.parametrize("capability", SETS)
def test_address_and_undefined_behaviour_sanitizers(capability, tmp_path):
    if sanitizer_is_missing(ADDRESS, tmp_path):
        pytest.skip(f"{COMPILER} has no address sanitizer")
    calls = calls_or(60)
    run([build(COMPILER, ADDRESS), capability, SEED + 10_000, calls, 1], calls, ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.parametrize("capability", SETS)
def test_thread_sanitizer(capability, tmp_path):
    """Eight threads of the test's own; the bits are those of one thread."""
    if sanitizer_is_missing(THREAD, tmp_path):
        pytest.skip(f"{COMPILER} has no thread sanitizer")
    calls = calls_or(40)
    # Its shadow memory wants the addresses where they were before kernels drew them from a wider range.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    run([*prefix, build(COMPILER, THREAD), capability, SEED + 20_000, calls, 8], calls)


@pytest.mark.parametrize("capability", SETS)
def test_threads_give_the_same_bits(capability):
    calls = calls_or(60)
    run([build(COMPILER, PLAIN), capability, SEED + 30_000, calls, 4], calls)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is missing")
@pytest.mark.parametrize("capability", SETS[:2])  # valgrind does not know AVX-512
def test_valgrind_finds_no_uninitialised_read(capability):
    command = ["valgrind", "--quiet", "--error-exitcode=9", build(COMPILER, PLAIN), capability, SEED + 40_000, 12, 1, 12]
    run(command, 12)


@pytest.mark.skipif(shutil.which(CLANG) is None, reason="clang++ is missing: the seeded driver above runs in any case")
def test_libfuzzer(tmp_path):
    """Byte strings grown by what the kernels' branches and comparisons make of them."""
    if sanitizer_is_missing(FUZZER, tmp_path, CLANG, FUZZED):
        pytest.skip(f"{CLANG} has no libFuzzer")
    program = build(CLANG, ("-O1", *FUZZER), SETS if SECONDS else SETS[:2])
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    numbers = random.Random(SEED)
    longest = 1 + 512  # the byte that chooses the set, and kBytesOfACall
    for i in range(20):  # from nothing it would take long to find a call of any size
        (corpus / str(i)).write_bytes(numbers.randbytes(longest))
    options = {"max_total_time": SECONDS or 20, "max_len": longest, "seed": SEED, "artifact_prefix": f"{tmp_path}/"}
    done = subprocess.run(
        [program, *(f"-{name}={value}" for name, value in options.items()), "-print_final_stats=1", corpus],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.returncode == 0, f"{program} FILE repeats the call of the file named last:\n{done.stderr[-6000:]}"
    calls, coverage = re.findall(r"^#(\d+)\s+DONE\s+(.+)", done.stderr, re.MULTILINE)[0]
    print(f"{calls} calls, {coverage}")
    assert int(calls) >= 100
