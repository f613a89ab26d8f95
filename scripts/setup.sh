#!/usr/bin/env bash
# Makes .venv with headfuse and the versions it was tested with. Sourced by demo.sh and test.sh; EXTRAS picks the extras.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
stamp=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)-${EXTRAS:-none}
if [ ! -e ".venv/$stamp" ]; then
    pins=constraints.txt
    if .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
        echo "Python 3.10 is too old for constraints.txt: all packages but torch are the newest that it can have" >&2
        pins=.venv/constraints.txt
        grep '^torch==' constraints.txt >"$pins"
    fi
    .venv/bin/python -m pip install --quiet --constraint "$pins" torch
    .venv/bin/python -m pip install --quiet --constraint "$pins" --editable ".${EXTRAS:+[$EXTRAS]}"
    touch ".venv/$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
