#!/usr/bin/env bash
# Tests the shipped model code on the oldest transformers it promises; arguments go to pytest.
set -euo pipefail
EXTRAS=dev
source "$(dirname "$0")/setup.sh"
oldest=.venv/transformers-5.16.1
[ -d "$oldest/transformers" ] || python -m pip install --quiet --target "$oldest" transformers==5.16.1
export PYTHONPATH="$PWD/$oldest:$PWD"
exec python -m pytest tests/test_modeling.py "$@"
