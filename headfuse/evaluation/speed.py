"""Decode speed of a model against its baseline, measured in turn on one prompt, so that a busy machine slows both."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from headfuse.models.states import cache_argument

WARM_UP = 2
NEW_TOKENS = 16


@dataclass(frozen=True)
class DecodeSpeed:
    """Medians over rounds: tokens per second of each, and the median of the rounds' own ratios, model to baseline."""

    context: int
    new_tokens: int
    rounds: int
    device: str
    dtype: str
    model: float
    baseline: float
    ratio: float


@torch.no_grad()
def decode_speed(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    prompt: torch.Tensor,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 5,
) -> DecodeSpeed:
    """Measure both models in turn, `rounds` times after a warm-up; prefill is not counted.

    The prompt is cut where the new tokens would not fit into the positions of a model.

    Args:
        model: one model.
        baseline: the other.
        prompt: token ids `[1, context]`.
        new_tokens: greedy steps in a round.
        rounds: how many pairs.
    """
    limits = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in (model, baseline)]
    room = min((limit for limit in limits if limit), default=prompt.shape[1] + WARM_UP + new_tokens)
    prompt = prompt[:, : max(1, room - WARM_UP - new_tokens)]
    speeds: list[tuple[float, float]] = []
    for index in range(rounds):
        order = (model, baseline) if index % 2 == 0 else (baseline, model)
        measured = {id(m): _tokens_per_second(m, prompt, new_tokens) for m in order}
        speeds.append((measured[id(model)], measured[id(baseline)]))
    return DecodeSpeed(
        context=prompt.shape[1],
        new_tokens=new_tokens,
        rounds=rounds,
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        model=statistics.median(mine for mine, _ in speeds),
        baseline=statistics.median(theirs for _, theirs in speeds),
        ratio=statistics.median(mine / theirs for mine, theirs in speeds),
    )


def _tokens_per_second(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> float:
    output = model(input_ids=prompt.to(model.device), use_cache=True, logits_to_keep=1)
    began = 0.0
    for step in range(WARM_UP + new_tokens):
        if step == WARM_UP:
            _wait(model.device)
            began = time.perf_counter()
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, **{cache_argument(model): output.past_key_values}, use_cache=True)
    _wait(model.device)
    return new_tokens / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
