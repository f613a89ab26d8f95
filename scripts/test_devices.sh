#!/usr/bin/env bash
# Tests on a CUDA device that is pretended by the CPU (tests/support/pretended_cuda), then on one without float64, as MPS.
# Skipped, with the reason, where PyTorch has CUDA or there is no g++. On a machine with a GPU: pytest tests/devices.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
python -c "from tests.support.pretended_cuda.build import build, UnavailableError
try: build()
except UnavailableError as reason: print('skipped:', reason)"  # once, not in every process
on_device() { python -m pytest -q -n 2 --dist load -p tests.support.pretended_cuda.plugin "$@"; }
on_device tests/devices tests/conversion/test_refine.py tests/planning/test_costs.py
