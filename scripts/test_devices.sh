#!/usr/bin/env bash
# Tests on a CUDA device that the CPU pretends to be (tests/support/pretended_cuda), then on one without float64, as MPS.
# They skip themselves, with the reason, where PyTorch has CUDA or there is no g++. With a GPU: pytest tests/devices.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
on_device() { python -m pytest -q -p tests.support.pretended_cuda.plugin "$@"; }
on_device tests/devices/test_pretended_cuda.py -k tensors  # compiles it, once for the processes that follow
on_device -n 2 --dist worksteal tests/devices tests/planning/test_costs.py tests/contracts/test_families.py \
    -k "devices or costs or (planted_groups_are_lossless and decoupled) or refined"
on_device -n 2 --dist worksteal --no-float64 tests/devices/test_commands.py
