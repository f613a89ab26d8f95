#!/usr/bin/env bash
# Sets up .venv, then runs the linters and the test suite; arguments go to pytest (for example: -m slow).
set -euo pipefail
EXTRAS=dev
source "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
mypy
exec python -m pytest -n 2 --dist loadfile "$@"
