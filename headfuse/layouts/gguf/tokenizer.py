"""A Hugging Face tokenizer as the `tokenizer.ggml.*` keys of a GGUF file: byte-level BPE and SentencePiece BPE."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headfuse.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, tuple[list[tuple[str, Any]], bool]] = {
    "gpt-2": ([("ByteLevel", True)], False),
    "smollm": ([("Digits", True), ("ByteLevel", True)], False),
    "qwen2": ([("Split", _GPT4.replace("NUMBERS", r"\p{N}")), ("ByteLevel", False)], False),
    "llama-bpe": ([("Split", _GPT4.replace("NUMBERS", r"\p{N}{1,3}")), ("ByteLevel", False)], True),
    "dbrx": ([("Split", _GPT4.replace("NUMBERS", r"\p{N}{1,3}")), ("ByteLevel", False)], False),
}
"""llama.cpp's name of a pre-tokenizer -> its steps, and whether whole words are looked up before any merge."""
Keys = list[tuple[str, Any]]
"""Names without `tokenizer.ggml.`, and values."""


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: object) -> Keys:
    """The keys of a tokenizer; tokens are padded, or cut, to the rows of the model's embeddings.

    Raises:
        UnsupportedModelError: for a tokenizer that llama.cpp does not have, naming those that can be exported.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("it has no fast form (tokenizer.json)", where)
    spec = json.loads(backend.to_str())
    model, pieces = spec["model"], tokenizer.get_vocab()
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, and only BPE is supported", where)
    build: Callable[[dict[str, Any], object], Keys] = _sentencepiece if model.get("byte_fallback") else _byte_level
    own = build(spec, where)
    added = {token["content"]: token for token in spec["added_tokens"]}
    texts, types = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    for text, index in pieces.items():
        if index < vocab_size:
            texts[index], types[index] = text, _type(text, added.get(text), model)
    cut = {text for text, index in pieces.items() if index >= vocab_size}
    keys: Keys = [*own, ("tokens", texts), ("token_type", types)]
    if model.get("byte_fallback"):
        ranks = {left + right: -rank for rank, (left, right) in reversed(list(enumerate(_merges(model))))}
        keys.append(("scores", [float(ranks.get(text, 0)) for text in texts]))
    else:
        keys.append(("merges", [f"{left} {right}" for left, right in _merges(model) if left + right not in cut]))
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None and index < vocab_size:
            keys.append(({"unk": "unknown", "pad": "padding"}.get(name, name) + "_token_id", index))
    empty = tokenizer("").input_ids
    keys += [
        ("add_bos_token", bool(empty) and empty[0] == tokenizer.bos_token_id),
        ("add_eos_token", bool(empty) and empty[-1] == tokenizer.eos_token_id != empty[0]),
    ]
    return keys


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's default chat template."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _type(text: str, added: dict[str, Any] | None, model: dict[str, Any]) -> int:
    if text == model.get("unk_token"):
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    return BYTE if model.get("byte_fallback") and _is_byte(text) else NORMAL


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, most important first; older files write a pair as one string."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, those of sequences in their place."""
    if part is None:
        return []
    return [s for p in part[inner] for s in _steps(p, inner)] if part["type"] == "Sequence" else [part]


def _byte_level(spec: dict[str, Any], where: object) -> Keys:
    """Keys of a byte-level BPE; llama.cpp has a fixed list of pre-tokenizers, recognised here by their steps."""
    steps, model = _steps(spec["pre_tokenizer"], "pretokenizers"), spec["model"]
    normalizers = {step["type"] for step in _steps(spec["normalizer"], "normalizers")} - {"NFC"}  # llama.cpp: none
    if normalizers or any(step.get("add_prefix_space") for step in steps):
        raise _refusal("it changes the text in a way that llama.cpp does not", where)
    seen = []
    for step in steps:
        what = {"ByteLevel": step.get("use_regex"), "Digits": step.get("individual_digits")}.get(step["type"])
        seen.append((step["type"], step["pattern"].get("Regex") if step["type"] == "Split" else what))
    for name, (wanted, whole_words) in PRE_TOKENIZERS.items():
        if seen == wanted and whole_words == bool(model.get("ignore_merges")):
            return [("model", "gpt2"), ("pre", name)]
    names = " then ".join(kind for kind, _ in seen) or "none"
    raise _refusal(f"headfuse knows no counterpart in llama.cpp of its pre-tokenizer ({names})", where)


def _sentencepiece(spec: dict[str, Any], where: object) -> Keys:
    """Keys of a SentencePiece BPE with byte fallback, which merges by the rank of the merged piece."""
    model, vocab = spec["model"], spec["model"]["vocab"]
    normalizers = _steps(spec["normalizer"], "normalizers")
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    prefix = any(step["type"] == "Prepend" for step in normalizers)
    known = all(
        (step["type"] == "Prepend" and step["prepend"] == "▁")
        or (step["type"] == "Replace" and step["content"] == "▁" and step["pattern"] == {"String": " "})
        for step in normalizers
    )
    if steps:
        known &= len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0].get("split") and not normalizers
        prefix |= steps[0].get("prepend_scheme") in ("first", "always")
    if not known or not (normalizers or steps):
        raise _refusal("it does not mark spaces as SentencePiece does", where)
    if any(f"<0x{byte:02X}>" not in vocab for byte in range(256)):
        raise _refusal("it falls back to bytes, but does not have all 256 of them", where)
    merges = set(_merges(model))
    added = {token["content"] for token in spec["added_tokens"]}
    for piece in vocab:
        if piece in added or _is_byte(piece):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and (left, right) not in merges and not {left, right} & added:
                raise _refusal(f"its merges are not those of SentencePiece ({left!r} and {right!r})", where)
    return [("model", "llama"), ("pre", "default"), ("add_space_prefix", prefix)]


def _refusal(reason: str, where: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the tokenizer cannot be written to a GGUF file: {reason}",
        where=where,
        fix="byte-level BPE (GPT-2, SmolLM, Llama 3, Qwen2) and SentencePiece BPE (Llama 2, Mistral) can be exported",
    )
