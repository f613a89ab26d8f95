"""How well a text fits a model: `python benchmarks/text_match.py FOLDER --text NAME=FILE ... [--own 128]`.

Of every text: the model's NLL per token, the mean entropy of its predictions at the same places, and their difference,
which is zero in the mean for text that the model itself wrote. `--own` samples texts of so many tokens from the model
and gives the same figures of them. Texts made here: random letters, random bytes (Latin-1), base64 of random bytes, and
the words of the first text, shuffled.
"""

from __future__ import annotations

import argparse
import base64
import random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import headfuse
from headfuse.models.loading import load_tokenizer
from headfuse.text.documents import read_documents
from headfuse.text.windows import token_windows

CHARACTERS = 40_000


def main() -> None:
    """Print a table, a row for each text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="FOLDER")
    parser.add_argument("--text", nargs="+", default=["default=default"], help="NAME=FILE")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--own", type=int, default=0, metavar="TOKENS", help="length of four texts of the model's own")
    options = parser.parse_args()
    model, tokenizer = headfuse.load(options.model), load_tokenizer(options.model)
    print("| text | NLL | entropy | difference |\n|---|---|---|---|")
    for entry in options.text:
        name, path = entry.split("=", 1)
        windows = token_windows(read_documents(path), tokenizer, options.length, options.windows)
        show(name, model, windows)
    for name, text in made(options.text[0].split("=", 1)[1]).items():
        show(name, model, windows_of(text, tokenizer, options.length, options.windows))
    if options.own:
        show("its own samples", model, own_samples(model, tokenizer, options.own))


def show(name: str, model: PreTrainedModel, windows: torch.Tensor) -> None:
    """Print the row of a text."""
    with torch.no_grad():
        logs = model(windows).logits[:, :-1].float().log_softmax(-1)
    nll = -logs.gather(-1, windows[:, 1:, None]).mean().item()
    entropy = -(logs.exp() * logs).sum(-1).mean().item()
    print(f"| {name} | {nll:.3f} | {entropy:.3f} | {nll - entropy:+.3f} |", flush=True)


def made(path: str) -> dict[str, str]:
    """Texts that no model was trained on."""
    draw = random.Random(0)
    noise = bytes(draw.randrange(256) for _ in range(CHARACTERS))
    words = " ".join(read_documents(path))[:CHARACTERS].split()
    return {
        "random letters": "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(CHARACTERS)),
        "random bytes": noise.decode("latin1"),
        "base64": base64.b64encode(noise).decode(),
        "shuffled words": " ".join(draw.sample(words, len(words))),
    }


def windows_of(text: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> torch.Tensor:
    """The first windows of a text, `[count, length]`."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)[:count]


def own_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> torch.Tensor:
    """Four texts sampled from the model's distribution, `[4, tokens + 1]`, each after the token that ends a text."""
    torch.manual_seed(0)
    start = torch.full((4, 1), tokenizer.eos_token_id or 0)
    sampled: torch.Tensor = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, min_new_tokens=tokens,
        max_new_tokens=tokens, pad_token_id=0,
    )  # fmt: skip
    return sampled


if __name__ == "__main__":
    main()
