"""Retrieval over a long context: a number hidden in filler text, asked for at the end (arXiv 2305.16300)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.errors import ConfigError
from headfuse.evaluation.perplexity import Predictions
from headfuse.models.states import model_states, softcap
from headfuse.text.bos import start_token

_INTRO = "There is an important fact hidden in a lot of irrelevant text. Find it and memorise it.\n"
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_FACT = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Retrieval:
    """One prompt: `found` if the greedy answer is the key, and the NLL of the key's tokens, a finer measure."""

    length: int
    found: bool
    nll: float


def passkey_prompts(
    tokenizer: PreTrainedTokenizerBase, length: int, trials: int, seed: int = 0
) -> list[tuple[list[int], int]]:
    """Token ids of `length` tokens, key included, with the number of tokens of the key; depths are spread evenly.

    Raises:
        ConfigError: for a length that the text around the key alone fills.
    """
    generator = random.Random(f"{seed} {length}")

    def ids(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return tokens

    start = start_token(tokenizer)
    intro, question, filler = ids(_INTRO), ids(_QUESTION), ids(_FILLER)
    if start is not None:
        intro = [start, *intro]
    prompts = []
    for trial in range(trials):
        key = str(generator.randrange(10_000, 100_000))
        fact, asked = ids(_FACT.format(key=key)), ids(f"{_QUESTION} {key}")
        # some tokenizers put a space before a text, so the key alone would begin with two, and not as in the fact
        size = len(asked) - next((i for i, token in enumerate(asked) if question[i : i + 1] != [token]), len(asked))
        room = length - len(intro) - len(fact) - len(asked)
        if room < 0:
            raise ConfigError(
                f"{length} tokens are too few: the test needs {length - room} without any filler",
                where="--passkey",
                fix=f"give {length - room} or more",
            )
        padding = (filler * (room // len(filler) + 1))[:room]
        depth = round(room * (trial + 0.5) / trials)
        prompts.append(([*intro, *padding[:depth], *fact, *padding[depth:], *asked], size))
    return prompts


@torch.no_grad()
def retrieve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], trials: int, seed: int = 0
) -> list[Retrieval]:
    """Ask a model for the key in `trials` prompts of each length; one forward pass a prompt."""
    head = Predictions(torch.empty(0), model.get_output_embeddings(), softcap(model.config))
    results = []
    for length in lengths:
        for tokens, size in passkey_prompts(tokenizer, length, trials, seed):
            batch = torch.tensor([tokens], device=model.device)
            logits = head.logits(model_states(model, batch).last[0, -size - 1 : -1])
            answer = batch[0, -size:]
            found = bool((logits.argmax(-1) == answer).all())
            results.append(Retrieval(length, found, F.cross_entropy(logits, answer).item()))
    return results
