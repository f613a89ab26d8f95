"""Damaged JSON and bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

SECRET = "outside-of-every-folder"
"""Part of the path of a file that nothing may open."""


def nasty(rng: random.Random) -> Any:
    """A value that does not belong where it is put, or only just."""
    deep: Any = 1
    for _ in range(rng.choice([3, 50, 900])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    outside = f"../{SECRET}/model.safetensors"
    choices: list[Any] = [
        None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e-300,
        1e308, float("nan"), float("inf"), "", " ", "0", "1/3", "four", "é\u2028\ud800", "\0", "a" * 5000, "evil.Evil",
        outside, f"../{SECRET}", "/dev/zero", "file:///etc/passwd", "~", "*", [], {}, [[]], [None], [0] * 100,
        list(range(40)), {"": 1}, {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}, deep,
        "llama", "qwen2", "headfuse", "mistral", "float64", "gelu", "decoupled", "gqa", "dynamic", "yarn",
    ]  # fmt: skip
    return rng.choice(choices)


KEYS = [
    "auto_map", "rope_parameters", "rope_scaling", "quantization_config", "tie_word_embeddings", "head_dim", "dtype",
    "sliding_window", "attention_bias", "layer_types", "rotary_slots", "tokenizer_class", "__metadata__", "gates",
    "weight_map", "architectures", "model_type", "trust_remote_code", "max_position_embeddings", "pad_token_id",
    "num_labels", "_attn_implementation", "tokenizer_file", "vocab_file", "chat_template", "budget", "calibration",
]  # fmt: skip


def mutated_json(document: Any, rng: random.Random) -> Any:
    """A copy with one to three changes anywhere in it."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(document))
        if not places:
            return nasty(rng)
        parent, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind < 3:
            parent[key] = nasty(rng)
        elif kind == 3:
            del parent[key]
        elif kind == 4:
            other, place = rng.choice(places)
            parent[key] = copy.deepcopy(other[place])
        elif kind == 5 and isinstance(parent, dict):
            parent[rng.choice(KEYS)] = nasty(rng)
        elif isinstance(parent[key], (int, float)):
            parent[key] = parent[key] * rng.choice([2, -1, 3, 1000]) + rng.choice([0, 1, -1])
        else:
            parent[key] = [parent[key], nasty(rng)]
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """A copy with a few bytes changed, dropped, doubled or put in, or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place = rng.randrange(len(data) + 1)
        size = rng.choice([1, 1, 2, 8, 100])
        kind = rng.randrange(5)
        if kind == 0:
            data[place : place + size] = rng.randbytes(size)
        elif kind == 1:
            del data[place : place + size]
        elif kind == 2:
            data[place:place] = data[place : place + size]
        elif kind == 3:
            data[place:place] = rng.choice(
                [b"\0", b"\xff\xfe", b"{", b"]", b'"', b"\n", b": ", b"- ", b"&a *a", b"9" * 99]
            )
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def dumped(document: Any) -> bytes:
    try:
        return json.dumps(document).encode()
    except RecursionError:
        return b"[" * 5000
