#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# What needs a GPU: build, tests (compute-sanitizer among them), timings. Needs torch 2.11 or newer and nvcc of the same major
# version, no network. Results go to the folder given as the first argument.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results/gpu}
mkdir -p "$results"
capability=$(python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
python -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' | tee "$results/device.txt"

TORCH_GATED_ATTN_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability pip install --no-build-isolation --no-deps -q -e .
status=0
python -m pytest -q tests -k cuda 2>&1 | tee "$results/tests.txt" || status=$?
python benchmarks/run.py --device cuda --dtypes bfloat16 --repeat 5 --path-limit 2 \
  --workloads T1,T2,T3,R1,X1,C1,P1,D1,A1,L1 --json "$results/timings.json" --png "$results/timings.png" || status=$?
exit "$status"
