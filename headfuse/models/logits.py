"""Losses on logits, in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headfuse.models.states import capped

_CHUNK_LOGITS, _CHUNK_TOKENS = 2**22, 256
"""Numbers in a chunk of logits, and its fewest tokens: small blocks of memory are reused."""
_WINDOWS_AT_ONCE = 8


def kl_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Forward divergence KL(teacher || student), summed over tokens; both logits are `[tokens, vocabulary]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return divergence_from(log_probabilities(teacher_logits.to(dtype)), logits)


def divergence_from(log_teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The same, where several students have one teacher: `log_teacher` is `log_probabilities` of its logits."""
    return F.kl_div(log_probabilities(logits), log_teacher, reduction="sum", log_target=True)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of logits `[tokens, vocabulary]`, in float32 at least."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def chunk_tokens(vocabulary: int) -> int:
    """Number of tokens whose logits are computed at once."""
    return max(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary)


@torch.no_grad()
def window_nll(
    hidden: torch.Tensor, head: nn.Module, batch: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """Mean NLL of the predictions inside each window, `[windows]`, float64.

    `hidden [windows, length, D]` is what the head reads, `batch [windows, length]` the tokens; `softcap` as in
    `states.softcap`.
    """
    states, targets = hidden[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
    weight: Any = head.weight
    size = chunk_tokens(weight.shape[0])
    chunks = zip(states.split(size), targets.split(size), strict=True)
    losses = [F.cross_entropy(capped(head(part), softcap).float(), wanted, reduction="none") for part, wanted in chunks]
    # float32 first: mps has no float64
    return torch.cat(losses).view(len(batch), -1).cpu().double().mean(dim=1)


@torch.no_grad()
def nll_in_batches(
    windows: torch.Tensor, device: torch.device, nll: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """NLL per token of each of `windows [n, length]`, as `[n]`; `nll` gives that of a few of them on the device."""
    if not len(windows):
        return torch.empty(0, dtype=torch.float64)
    return torch.cat([nll(batch.to(device)) for batch in windows.split(_WINDOWS_AT_ONCE)])
