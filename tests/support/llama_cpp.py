"""GGUF files in llama.cpp, through the prebuilt wheel `xllamacpp`."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import headfuse
from tests.support.commands import run
from tests.support.tiny_models import VOCABULARY

xllamacpp = pytest.importorskip("xllamacpp", reason="the wheel xllamacpp (llama.cpp) is not installed")

PLAIN = 10
"""A token of one ASCII character in the tokenizers of the tests."""


class LlamaCpp:
    """A GGUF file in llama.cpp, with a float32 cache."""

    def __init__(self, file: Path) -> None:
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx, options.n_batch, options.n_parallel, options.verbosity = 256, 256, 1, 0
        options.warmup = options.fit_params = False
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(options)

    def log_probabilities(self, tokens: Sequence[int], vocabulary: int) -> torch.Tensor:
        """Of every next token after `tokens`, `[vocabulary]`."""
        request = {"prompt": list(tokens), "n_predict": 1, "n_probs": vocabulary, "post_sampling_probs": False}
        # the answer is empty after half a character or the end of the text: a plain letter is to be chosen, which
        # leaves the probabilities before sampling as they are
        answer = self.server.handle_completions({**request, "temperature": 0, "logit_bias": [[PLAIN, 1000]]})
        (place,) = answer["choices"][0]["logprobs"]["content"]
        result = torch.full((vocabulary,), float("nan"))
        for entry in place["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result

    def generate(self, prompt: str, tokens: int) -> str:
        """Text after a prompt, the most probable tokens."""
        answer = self.server.handle_completions({"prompt": prompt, "n_predict": tokens, "temperature": 0})
        text: str = answer["choices"][0]["text"]
        return text

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids, with the special tokens of a new text if `special`."""
        tokens: list[int] = self._post("/tokenize", {"content": text, "add_special": special})["tokens"]
        return tokens

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """The text that the chat template makes of messages."""
        prompt: str = self._post("/apply-template", {"messages": messages})["prompt"]
        return prompt

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            result: dict[str, Any] = json.load(answer)
        return result


def export(folder: Path, file: Path, *options: object) -> dict[str, Any]:
    """Write a folder as a GGUF file with the command; returns its document."""
    line = run("export", folder, "--to", "gguf", "-o", file, "--json", *options)
    document: dict[str, Any] = json.loads(line.splitlines()[-1])
    return document


def assert_same(folder: Path, file: Path, tolerance: float = 5e-3, length: int = 24) -> None:
    """Next-token log-probabilities after several prompts, and the cache's growth by single tokens."""
    model, llama = headfuse.load(folder), LlamaCpp(file)
    tokens = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0].log_softmax(-1)
    for end in (1, 7, length):
        got = llama.log_probabilities(tokens[:end].tolist(), VOCABULARY)
        torch.testing.assert_close(got, expected[end - 1], rtol=0, atol=tolerance)
