#!/usr/bin/env bash
# Makes .venv with headfuse and the versions it was tested with. Sourced by demo.sh and test.sh; EXTRAS picks the extras.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
stamp=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)-${EXTRAS:-none}
if [ ! -e ".venv/$stamp" ]; then
    .venv/bin/python -m pip install --quiet --constraint constraints.txt torch
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".${EXTRAS:+[$EXTRAS]}"
    touch ".venv/$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
