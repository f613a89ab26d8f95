#!/usr/bin/env bash
# Sets up .venv, then builds the documentation into site/; a broken link or a page that nothing leads to is an error.
set -euo pipefail
EXTRAS=docs
source "$(dirname "$0")/setup.sh"
exec mkdocs build --strict "$@"
