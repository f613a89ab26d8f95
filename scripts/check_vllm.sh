#!/usr/bin/env bash
# What vLLM's own code makes of model folders, on a machine without a GPU: ./scripts/check_vllm.sh FOLDER ...
# vLLM's pins differ from headfuse's, so it gets an environment of its own, .venv-vllm (about 2 GB, once); its wheel is
# installed without the CUDA packages that it depends on.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e .venv-vllm/ready ]; then
    python3 -m venv .venv-vllm
    pip=".venv-vllm/bin/python -m pip install --quiet"
    $pip --constraint constraints.txt torch
    $pip "transformers==5.16.1" safetensors regex numpy pydantic pillow jinja2 pyyaml psutil tqdm cachetools py-cpuinfo \
        blake3 requests aiohttp pyzmq msgspec cloudpickle cbor2 pybase64 partial-json-parser jsonschema \
        prometheus_client einops sentencepiece tiktoken lark python-json-logger setproctitle ijson orjson openai \
        openai-harmony watchfiles uvloop uvicorn "fastapi>=0.133,<0.137" anthropic "lm-format-enforcer==0.11.3" \
        opencv-python-headless gguf llguidance
    $pip --no-deps "vllm==0.33.0" "compressed-tensors==0.17.0" "depyf==0.20.0" mistral_common "xgrammar==0.2.8" \
        "apache-tvm-ffi==0.1.11"
    touch .venv-vllm/ready
fi
[ $# -eq 0 ] || VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 .venv-vllm/bin/python scripts/check_vllm.py "$@"
