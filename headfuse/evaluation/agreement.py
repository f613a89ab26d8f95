"""Difference between a model's next-token distributions and its baseline's, per domain of the text and per position.

An average over all text would hide a loss in one domain, or at the end of a long context.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from headfuse.estimates import Estimate, clustered_mean
from headfuse.evaluation.perplexity import EvaluationText, Predictions, token_chunks


@dataclass(frozen=True)
class PartAgreement:
    """The figures of one part of the predictions.

    `kl` is KL(baseline || model) in nats per token, `top1_agreement` the share of tokens where both have the same most
    likely token, `nll_gap` model minus baseline.
    """

    part: str
    kl: Estimate
    top1_agreement: Estimate
    nll_gap: Estimate


@dataclass(frozen=True)
class Agreement:
    """Figures of all predictions, by the documents' field `source` (if present), and by position in the window."""

    overall: PartAgreement
    domains: list[PartAgreement]
    positions: list[PartAgreement]


@torch.no_grad()
def agreement(
    model: Predictions, baseline: Predictions, text: EvaluationText, model_nll: torch.Tensor, baseline_nll: torch.Tensor
) -> Agreement:
    """Compare two models' predictions of the same text, a chunk of tokens at a time.

    Args:
        model: its predictions.
        baseline: those of the baseline; the vocabularies must be equal.
        text: the windows.
        model_nll: `[windows, length - 1]` as `token_nll` gives.
        baseline_nll: the same of the baseline.
    """
    kl, same = torch.empty(text.scored.numel(), dtype=torch.float64), torch.empty(text.scored.numel())
    mine, theirs = model.states.flatten(0, 1), baseline.states.flatten(0, 1)
    for part in token_chunks(model):
        logits = model.logits(mine[part])
        reference = baseline.logits(theirs[part]).to(logits.device)
        width = min(logits.shape[-1], reference.shape[-1])  # rows beyond the tokenizer differ by padding alone
        logits, reference = logits[:, :width], reference[:, :width]
        log_model, log_reference = F.log_softmax(logits, -1), F.log_softmax(reference, -1)
        kl[part] = F.kl_div(log_model, log_reference, reduction="none", log_target=True).sum(-1).cpu().double()
        same[part] = (logits.argmax(-1) == reference.argmax(-1)).float().cpu()
    values = (kl.view_as(text.scored), same.double().view_as(text.scored), model_nll - baseline_nll)

    def figures(name: str, chosen: torch.Tensor) -> PartAgreement | None:
        estimates = [clustered_mean(value, chosen) for value in values]
        kept = [estimate for estimate in estimates if estimate is not None]
        return PartAgreement(name, *kept) if kept else None

    overall = figures("all", text.scored)
    assert overall is not None
    named = text.names if any(text.names) else []
    domains = [figures(name or "unnamed", text.scored & (text.domains == i)) for i, name in enumerate(named)]
    places = torch.arange(1, text.windows.shape[1]).expand_as(text.scored)
    buckets = [
        figures(f"{first}-{last}", text.scored & (places >= first) & (places <= last))
        for first, last in position_buckets(text.windows.shape[1])
    ]
    return Agreement(overall, [d for d in domains if d is not None], [b for b in buckets if b is not None])


def position_buckets(length: int) -> list[tuple[int, int]]:
    """First and last position of each bucket: 1 to 15, then each four times as far as the one before."""
    edges = [1]
    while edges[-1] < length:
        edges.append(16 if edges[-1] == 1 else 4 * edges[-1])
    return [(first, min(last, length) - 1) for first, last in pairwise(edges)]
