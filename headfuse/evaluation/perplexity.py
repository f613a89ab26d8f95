"""NLL of text by a stated protocol: which windows, and which predictions in them count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.errors import DataError
from headfuse.models.logits import chunk_tokens
from headfuse.models.states import capped, model_states, softcap
from headfuse.text.bos import start_token
from headfuse.text.windows import labelled_tokens, with_start


@dataclass(frozen=True)
class EvaluationText:
    """Windows of text, which of their predictions count, and where each predicted token comes from.

    `windows` is `[windows, length]`; `scored` (bool) and `domains` (index into `names`) are `[windows, length - 1]`.
    `begun`: every window begins with BOS.
    """

    windows: torch.Tensor
    scored: torch.Tensor
    domains: torch.Tensor
    names: list[str]
    begun: bool = False


def evaluation_text(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    samples: int,
    stride: int,
    where: str | None = None,
) -> EvaluationText:
    """Windows that begin every `stride` tokens; each prediction counts once, in the first window that holds it.

    With a stride below the length, all but the first window predict their last `stride` tokens only, so that each has
    at least `length - stride` tokens before it. With a stride of the length, windows are independent. They begin with
    BOS if `text.start_token` gives one; it takes the place of one token, and the first token of text is predicted.

    Raises:
        DataError: for text that does not fill one window.
    """
    start = start_token(tokenizer)
    room = sequence_length - (start is not None)
    step = min(stride, room)
    ids, places, names = labelled_tokens(documents, tokenizer, room + (samples - 1) * step)
    if len(ids) < room:
        raise DataError(
            f"holds {len(ids):,} tokens; {room:,} are needed for a window",
            where=where,
            fix="give more text, or a smaller --sequence-length",
        )
    windows, domains = ids.unfold(0, room, step), places.unfold(0, room, step)
    scored = torch.ones(len(windows), sequence_length - 1, dtype=torch.bool)
    scored[1:, : max(0, sequence_length - 1 - step)] = False
    return EvaluationText(
        with_start(windows, start), scored, domains[:, 1 - sequence_length :], names, start is not None
    )


def nll_protocol(text: EvaluationText, stride: int, *, shuffled: bool = False) -> str:
    """The protocol of a figure, in words."""
    windows, length = text.windows.shape
    bos = "each begins with BOS" if text.begun else "without BOS"
    order = "shuffled" if shuffled else "in file order"
    what = "independent, non-overlapping windows" if stride == length else "windows"
    how = (
        f"{length - 1} predictions in each"
        if stride == length
        else f"one every {stride} tokens, whose last {stride} tokens are predicted (of the first, all)"
    )
    return (
        f"NLL per token in nats over the first {windows} {what} of {length} tokens of the text as it is (documents"
        f" {order}, joined by EOS), {bos}, {how}, {int(text.scored.sum())} predictions in all; perplexity is its"
        " exponential"
    )


@dataclass(frozen=True)
class Predictions:
    """The hidden states that a model's head reads for each prediction, and the head: much smaller than logits.

    `states` is `[windows, predictions, hidden_size]`, on the CPU.
    """

    states: torch.Tensor
    head: nn.Module
    softcap: float | None

    @property
    def weight(self) -> torch.Tensor:
        """The head's matrix `[vocabulary, hidden_size]`."""
        weight = self.head.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `[tokens, vocabulary]`, float32, of some of the states."""
        logits: torch.Tensor = self.head(states.to(self.weight.device, self.weight.dtype)).float()
        return capped(logits, self.softcap)


@torch.no_grad()
def predict(model: PreTrainedModel, windows: torch.Tensor) -> Predictions:
    """Run a model over windows `[windows, length]`, one by one; its training mode is left as it was."""
    training = model.training
    model.eval()
    states = [model_states(model, window[None].to(model.device)).last[0, :-1].cpu() for window in windows]
    model.train(training)
    return Predictions(torch.stack(states), model.get_output_embeddings(), softcap(model.config))


def token_chunks(predictions: Predictions) -> Iterator[slice]:
    """Slices over all predictions in order, sized to keep the logits small."""
    tokens, size = predictions.states.shape[:2].numel(), chunk_tokens(len(predictions.weight))
    return (slice(start, start + size) for start in range(0, tokens, size))


@torch.no_grad()
def token_nll(predictions: Predictions, windows: torch.Tensor) -> torch.Tensor:
    """NLL of each predicted token of windows `[windows, length]`: `[windows, length - 1]`, float64 on the CPU."""
    states, targets = predictions.states.flatten(0, 1), windows[:, 1:].flatten()
    losses = []
    for part in token_chunks(predictions):
        logits = predictions.logits(states[part])
        losses.append(F.cross_entropy(logits, targets[part].to(logits.device), reduction="none").cpu().double())
    return torch.cat(losses).view(len(windows), -1)


def nll_per_window(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean NLL of the predictions inside each window `[windows, length]`: `[windows]`, float64 on the CPU."""
    return token_nll(predict(model, windows), windows).mean(dim=1)
