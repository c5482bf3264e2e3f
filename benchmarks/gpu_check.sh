#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What needs a GPU: build, tests, compute-sanitizer. Needs torch 2.11 or newer and nvcc of the same major version, no network.
# Results go to the folder given as the first argument.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results/gpu}
mkdir -p "$results"
capability=$(python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
python -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' | tee "$results/device.txt"

TORCH_GATED_ATTN_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability pip install --no-build-isolation --no-deps -q -e .
status=0
python -m pytest -q tests -k cuda 2>&1 | tee "$results/tests.txt" || status=$?
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 python -m pytest -q tests/test_cuda.py -k graph \
      > "$results/$tool.txt" 2>&1 || { echo "compute-sanitizer $tool failed, see $results/$tool.txt"; status=1; }
  done
else
  echo "compute-sanitizer was not found: skipped"
fi
exit "$status"
