#!/usr/bin/env bash
# Tests the shipped model code, and every family with it, on the oldest transformers it promises; arguments go to pytest.
set -euo pipefail
EXTRAS=dev
source "$(dirname "$0")/setup.sh"
oldest=.venv/transformers-5.16.1
[ -d "$oldest/transformers" ] || python -m pip install --quiet --target "$oldest" transformers==5.16.1
export PYTHONPATH="$PWD/$oldest:$PWD"
python -m pytest tests/test_modeling.py "$@"
# one model of each family: converted once, reloaded, decoded with its cache, compared with its source
exec python -m pytest tests/test_families.py -k "decoupled and (reloads or cached or planted_groups_are_lossless)" "$@"
