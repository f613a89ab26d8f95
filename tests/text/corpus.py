"""A small corpus."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

SENTENCES = [f"The {animal} sees {count} ships\n on the river." for animal in ("cat", "dog") for count in range(20)]


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": document, "source": "x"}) + "\n" for document in documents))
    return str(path)


def packed(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that the windows must hold, the slow and obvious way."""
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.eos_token_id] * bool(ids) + tokenizer.encode(document, add_special_tokens=False)
    return ids


def record(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The cat."}]
