"""The training loss: divergence from a teacher over the full vocabulary, or cross-entropy, in chunks of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

_CHUNK_LOGITS, _CHUNK_TOKENS = 2**22, 256
"""Logits are computed in chunks of at most so many, or of so few tokens: small blocks of memory are used again."""
_KEPT_LOGITS = 2**26
"""Above so many in a batch, the backward pass computes them a second time instead of keeping them."""


def kl_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Forward divergence KL(teacher || student), summed over tokens; both logits are `[tokens, vocabulary]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_student = F.log_softmax(logits.to(dtype), dim=-1)
    log_teacher = F.log_softmax(teacher_logits.to(dtype), dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


class Objective(nn.Module):
    """A model with its training loss, computed in chunks of tokens: never all logits of a large vocabulary at once.

    One module, so that whatever needs gradients happens in the forward pass that accelerate wraps.

    Args:
        model: the student.
        chunk_tokens: tokens whose logits are computed at once; by default few where the vocabulary is large.
        kept_logits: in a larger batch the logits are computed again in the backward pass.
    """

    def __init__(
        self, model: PreTrainedModel, chunk_tokens: int | None = None, kept_logits: int = _KEPT_LOGITS
    ) -> None:
        super().__init__()
        self.model, self.kept_logits = model, kept_logits
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.chunk_tokens = chunk_tokens or max(_CHUNK_TOKENS, _CHUNK_LOGITS // self.vocabulary)

    def forward(
        self, batch: torch.Tensor, teacher: PreTrainedModel | None = None, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mean loss over the tokens of `batch [windows, length]`: KL with a teacher, cross-entropy without.

        `targets [windows, length, hidden_size]`, what the output embeddings read in a teacher that has the same
        ones, serve in the place of the teacher.
        """
        hidden, head = last_hidden_state(self.model, batch), self.model.get_output_embeddings()
        teacher_head = head
        if teacher is not None:
            with torch.no_grad():
                targets = last_hidden_state(teacher, batch)
            teacher_head = teacher.get_output_embeddings()
        distilled = targets is not None
        if targets is None:
            hidden, targets = hidden[:, :-1], batch[:, 1:]

        def loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if not distilled:
                return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
            return kl_divergence(head(hidden), teacher_head(targets))

        hidden, targets = hidden.flatten(0, 1), targets.flatten(0, 1)
        chunks = zip(hidden.split(self.chunk_tokens), targets.split(self.chunk_tokens), strict=True)
        if len(hidden) * self.vocabulary <= self.kept_logits:
            losses = [loss(*chunk) for chunk in chunks]
        else:
            losses = [checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / len(hidden)


def last_hidden_state(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """What the output embeddings read, `[windows, sequence_length, hidden_size]`."""
    return model.base_model(input_ids=batch, use_cache=False).last_hidden_state
