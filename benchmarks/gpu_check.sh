#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# The first minutes on a card, in this order: the library built for this card alone, whether every kernel is right, times,
# the CUDA tests that take seconds, compute-sanitizer. Every part has a limit of its own within that of the whole, none stops
# the next, and what a part finds is printed and written to the folder as it goes. Needs Python with torch 2.11 or newer,
# numpy, setuptools and ninja, nvcc of torch's major version, and for the tests pytest; no network. About six minutes on 16
# cores, never more than SECONDS.
#
#   bash benchmarks/gpu_check.sh RESULTS [PARTS] [SECONDS]      PARTS: "build table times tests sanitizer"; SECONDS: 475
#
# DEVICE=cpu tries the parts without a card: the table on the CPU's kernels, tiny shapes timed, no build, no sanitizer.
set -u
cd "$(dirname "$0")/.."
results=${1:?the first argument is a folder for the results}
parts=${2:-build table times tests sanitizer}
seconds=${3:-475}
device=${DEVICE:-cuda}
mkdir -p "$results"
export PYTHONUNBUFFERED=1
failed=()

# part NAME LIMIT COMMAND...: runs it if wanted, for at most LIMIT seconds or what is left.
part() {
  local name=$1 limit=$2 status=0 begin=$SECONDS left=$((seconds - SECONDS))
  shift 2
  [[ " $parts " == *" ${name%% *} "* ]] || return 0
  if ((left < 1)); then
    echo "=== $name: no time left"
    failed+=("$name")
    return 0
  fi
  echo "=== $name, at most $((left < limit ? left : limit)) s"
  timeout -s INT -k 10 $((left < limit ? left : limit)) "$@" 2>&1 | tee "$results/${name// /_}.txt"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failed+=("$name")
  echo "=== $name: exit $status after $((SECONDS - begin)) s, $SECONDS s in all"
}

# In a copy without pyproject.toml, whose licence field setuptools before 77 refuses. Times of files are kept, so that a
# second build compiles what has changed.
build() {
  local copy=build/gpu_check log=$results/build.log
  TORCH_CUDA_ARCH_LIST=$(python3 -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return 1
  export TORCH_CUDA_ARCH_LIST TORCH_GATED_ATTN_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
  mkdir -p $copy/torch_gated_attn
  cp -rp csrc setup.py $copy/
  python3 $copy/setup.py -q build_ext --inplace >"$log" 2>&1 || { tail -n 40 "$log"; return 1; }
  cp $copy/torch_gated_attn/_C*.so torch_gated_attn/
}

tests() {
  local files=() workers=()
  for name in cuda numerics masks special broadcast visibility layout determinism; do files+=("tests/test_$name.py"); done
  python3 -c 'import xdist' 2>/dev/null && workers=(-n 8)
  OMP_NUM_THREADS=2 python3 -m pytest -q -p no:cacheprovider --tb=short --maxfail=20 "${workers[@]}" "${files[@]}" \
    -k "$device and not sanitizer"
}

sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --kernel-name kernel_substring=torch_gated_attn python3 tests/tiny_calls.py | tail -n 30
  return "${PIPESTATUS[0]}"
}
export -f build tests sanitize
export results device

python3 -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__, torch.version.cuda)'
trial=()
if [[ $device == cpu ]]; then
  trial=(--device cpu)
else
  nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.sm,temperature.gpu --format=csv,noheader
  part build 240 bash -c build
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
part table 75 python3 benchmarks/gpu_table.py "$results" "${trial[@]}"
part times 120 python3 benchmarks/gpu_times.py "$results" --seconds 100 "${trial[@]}" ${trial:+--shrink 16}
part tests 120 bash -c tests
if [[ $device == cuda ]] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do part "sanitizer $tool" 40 bash -c "sanitize $tool"; done
fi
if ((${#failed[@]} > 0)); then
  printf '=== not right or not finished:'
  printf ' %s;' "${failed[@]}"
  printf '\n'
  exit 1
fi
echo "=== all parts passed"
