"""Log-probabilities of mlx-lm for a folder, of a prompt in two pieces with its cache: the token ids are JSON on stdin.

    python scripts/check_mlx.py FOLDER ... < prompt.json       (in an environment with mlx-lm)

Prints one JSON document per folder: `log_probabilities` [tokens, vocabulary], and the KV heads in each layer's cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

prompt = mx.array([json.load(sys.stdin)])
half = prompt.shape[1] // 2
for folder in sys.argv[1:]:
    model, _ = load_model(Path(folder))
    cache = model.make_cache()
    logits = mx.concatenate([model(prompt[:, :half], cache=cache), model(prompt[:, half:], cache=cache)], axis=1)[0]
    log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    heads = [layer.keys.shape[1] for layer in cache]
    print(json.dumps({"log_probabilities": log_probabilities.tolist(), "heads": heads}))
