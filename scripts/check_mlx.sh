#!/usr/bin/env bash
# Folders in mlx-lm, on a CPU: ./scripts/check_mlx.sh [-OPTION ..] runs tests/runtimes/test_mlx.py, with options of pytest.
# mlx-lm gets an environment of its own (made once): .venv/mlx, or $HEADFUSE_MLX. Exits with 75, and says why, where the
# packages cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
export HEADFUSE_MLX=$(realpath --canonicalize-missing "${HEADFUSE_MLX:-.venv/mlx}")
pins=("mlx[cpu]==0.32.4" "mlx-lm==0.32.2")
stamp=$HEADFUSE_MLX/$(sha256sum <<<"${pins[*]}" | cut -c1-16)
if [ ! -e "$stamp" ]; then
    echo "making $HEADFUSE_MLX (some minutes)"
    python3 -m venv "$HEADFUSE_MLX"
    "$HEADFUSE_MLX/bin/python" -m pip install --quiet "${pins[@]}" || {
        echo "mlx-lm was not run: pip could not get ${pins[*]}, see above" >&2
        exit 75
    }
    touch "$stamp"
fi
EXTRAS=dev
source scripts/setup.sh
exec python -m pytest tests/runtimes/test_mlx.py -m "slow or not slow" "$@"
