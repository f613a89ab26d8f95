"""Random models of known shapes, and their conversion on a GPU: what the GPU benchmarks share."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from headfuse.conversion import refine  # noqa: E402
from tests.support import pretended_cuda  # noqa: E402
from tests.support.tiny_models import tiny_model  # noqa: E402

LENGTH = 512
"""Tokens of a window."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    def narrower(self, by: int) -> Shape:
        """The same heads, fewer of them, in narrower layers."""
        parts = (self.hidden, self.heads, self.kv_heads, self.intermediate)
        hidden, heads, kv_heads, intermediate = (part // by for part in parts)
        return Shape(self.layers, hidden, heads, kv_heads, intermediate, self.vocabulary)


SHAPES = {
    "Llama-2-7B": Shape(32, 4096, 32, 32, 11008, 32000),
    "Llama-3-8B": Shape(32, 4096, 32, 8, 14336, 128256),
}


def random_model(folder: Path, shape: Shape, layers: int | None = None) -> Path:
    """A random Llama of a shape in float16, with a tokenizer of 300 tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = tiny_model(folder / "small")
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=4096, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() and not pretended_cuda.started() else "cpu"
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
        model.save_pretrained(folder / "model")
    finally:
        torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder / "model")
    return folder / "model"


def fused(model: Path, output: Path, preset: str, samples: int, **options: str) -> dict[str, float]:
    """Fuse a model on the device: seconds of each stage, the end of the one before counted as its beginning."""
    import headfuse

    seconds, last = dict[str, float](), time.monotonic()

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        seconds[stage], last = seconds.get(stage, 0.0) + now - last, now

    headfuse.fuse(
        model, budget=0.25, layout="decoupled", preset=preset, device="cuda", samples=samples, sequence_length=LENGTH,
        data="default", output=output, overwrite=True, on_progress=on_progress, **options,
    )  # fmt: skip
    seconds["files"] = time.monotonic() - last
    return seconds


@contextlib.contextmanager
def refining_random_weights() -> Iterator[None]:
    """Refine also what has lost nothing: a random model's text is as likely after fusing as before."""
    threshold = refine.NEGLIGIBLE_NLL
    refine.NEGLIGIBLE_NLL = -math.inf
    try:
        yield
    finally:
        refine.NEGLIGIBLE_NLL = threshold
