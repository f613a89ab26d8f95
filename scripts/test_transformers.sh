#!/usr/bin/env bash
# Tests the shipped model code, and every family with it, on another transformers than the pinned one:
#     ./scripts/test_transformers.sh oldest|newest|VERSION [arguments of pytest]
# oldest and newest are the ends of what pyproject.toml allows, newest by the releases there are today.
set -euo pipefail
wanted=${1:?"usage: $0 oldest|newest|VERSION [arguments of pytest]"}
shift
EXTRAS=dev
source "$(dirname "$0")/setup.sh"
allowed=$(sed -n 's/^ *"\(transformers[^"]*\)",$/\1/p' pyproject.toml)
case $wanted in
oldest) version=$(sed 's/.*>=\([0-9.]*\).*/\1/' <<<"$allowed") ;;
newest)
    version=$(python -m pip install --quiet --dry-run --no-deps --ignore-installed --report - "$allowed" |
        python -c "import json, sys; print(json.load(sys.stdin)['install'][0]['metadata']['version'])")
    ;;
*) version=$wanted ;;
esac
if [ "$version" = "$(python -c "import importlib.metadata as m; print(m.version('transformers'))")" ]; then
    echo "transformers $version ($wanted) is the pinned one: ./scripts/test.sh tests it"
    exit
fi
echo "transformers $version ($wanted)"
folder=.venv/transformers-$version
[ -d "$folder/transformers" ] || python -m pip install --quiet --target "$folder" "transformers==$version"
export PYTHONPATH="$PWD/$folder:$PWD"
python -m pytest tests/modeling tests/layouts/test_layerwise.py tests/contracts/test_generation.py "$@"
# one model of each family: run as its source, converted once, reloaded, decoded with its cache
exec python -m pytest tests/contracts/test_families.py -k "not gqa and (streamed or reloads or cached or lossless)" "$@"
