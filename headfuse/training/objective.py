"""The training objective: divergence from the teacher, cross-entropy, hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from headfuse.models.logits import chunk_tokens, window_nll
from headfuse.models.states import States, capped, model_states, softcap

ChunkLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""(logits of a chunk `[tokens, vocabulary]`, float32, its place) -> (sum of the loss, gradient
of that sum by the logits)."""


def _kl_chunk(logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_student, log_teacher = F.log_softmax(logits, dim=-1), F.log_softmax(teacher_logits.float(), dim=-1)
    teacher = log_teacher.exp()
    loss = torch.linalg.vecdot(teacher, log_teacher.sub_(log_student)).sum()
    return loss, log_student.exp_().sub_(teacher)


def _ce_chunk(logits: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_student, index, counts = F.log_softmax(logits, dim=-1), targets.unsqueeze(-1), counts.unsqueeze(-1)
    loss = -(log_student.gather(-1, index) * counts).sum()
    return loss, log_student.exp_().mul_(counts).scatter_add_(-1, index, -counts)


class _HeadLoss(torch.autograd.Function):
    """A loss of the logits `hidden [tokens, D] @ weight [V, D]^T + bias`, summed over tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, loss: ChunkLoss, chunk: int
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        states, matrix, total = hidden.to(dtype), weight.to(dtype), hidden.new_zeros((), dtype=torch.float32)
        offset = None if bias is None else bias.to(dtype)
        of_hidden = torch.empty_like(hidden) if need_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                value, gradient = loss(F.linear(states[part], matrix, offset).float(), part)
                total += value
                if of_bias is not None:
                    of_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                if of_hidden is not None:
                    of_hidden[part] = gradient @ matrix
                if of_weight is not None and dtype == torch.float32:
                    of_weight.addmm_(gradient.mT, states[part])
                elif of_weight is not None:
                    of_weight += gradient.mT @ states[part]
        ctx.gradients = of_hidden, of_weight, of_bias
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        scale, (of_hidden, of_weight, of_bias) = gradients[0], ctx.gradients
        ctx.gradients = None
        return (
            None if of_hidden is None else of_hidden.mul_(scale),
            None if of_weight is None else of_weight.mul_(scale).to(ctx.dtypes[0]),
            None if of_bias is None else of_bias.mul_(scale).to(ctx.dtypes[1]),
            None,
            None,
        )


def relative_error(states: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Squared error over squared size, per token, then the mean over tokens and layers.

    Per token: the states of an attention sink are a thousand times larger than the others.
    """
    errors = [
        ((have.float() - want.float()).square().sum(-1) / want.float().square().sum(-1).clamp_min(1e-6)).mean()
        for have, want in zip(states, wanted, strict=True)
    ]
    return torch.stack(errors).mean()


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts."""

    kl: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0


class Objective(nn.Module):
    """A model with its training loss, in one module, so that accelerate wraps everything that needs gradients.

    Args:
        model: the student.
        teacher_head: what the teacher's last states go through, on the student's device.
        weights: of the terms.
        chunk: tokens whose logits are computed at once; by default few where the vocabulary is large.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_head: nn.Module | None = None,
        weights: LossWeights | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.weights = model, weights or LossWeights(*((1.0, 0.0) if teacher_head else (0.0, 1.0)))
        self._teacher_head = (teacher_head,)  # in a tuple: not a part of this module's state
        self.chunk = chunk or chunk_tokens(model.get_output_embeddings().weight.shape[0])
        self.softcap = softcap(model.config)
        self._no_split_modules = model._no_split_modules  # what FSDP shards one by one

    def forward(
        self,
        batch: torch.Tensor,
        teacher: States | None = None,
        positions: torch.Tensor | None = None,
        mode: str = "loss",
    ) -> torch.Tensor:
        """The mean loss over the tokens of `batch [windows, length]`.

        Modes: `loss`; `layerwise`, each layer alone from the teacher's input to its output, as a share of what the
        layer adds; `nll`, no loss but the NLL of every window, `[windows]`.
        """
        if mode == "layerwise":
            assert teacher is not None
            mine = model_states(self.model, batch, positions, inputs=teacher.inputs)
            added = [
                tuple(after - before for after, before in zip(states.outputs, teacher.inputs, strict=True))
                for states in (mine, teacher)
            ]
            return relative_error(*added)
        mine = model_states(self.model, batch, positions, layers=self.weights.hidden > 0 and mode == "loss")
        head = self.model.get_output_embeddings()
        if mode == "nll":
            return window_nll(mine.last, head, batch, self.softcap)
        loss = self._of_logits(mine.last, head, batch, teacher)
        if self.weights.hidden:
            assert teacher is not None
            loss = loss + self.weights.hidden * relative_error(mine.outputs, teacher.outputs)
        return loss

    def tie_weights(self) -> None:
        """Tie the model's weights again, because sharding separates them."""
        self.model.tie_weights()

    def _of_logits(
        self, hidden: torch.Tensor, head: nn.Module, batch: torch.Tensor, teacher: States | None
    ) -> torch.Tensor:
        """The loss of logits: divergence at every token, cross-entropy at each token with a next token in its
        window.
        """
        windows, length = batch.shape
        (teacher_head,), weights = self._teacher_head, self.weights
        targets = F.pad(batch[:, 1:], (0, 1)).flatten()
        # the last token of a window predicts nothing: its weight is 0
        counts = F.pad(batch.new_ones((windows, length - 1), dtype=torch.float32), (0, 1)).flatten()
        counts = counts * (weights.cross_entropy / (windows * (length - 1)))
        wanted = None if teacher is None else teacher.last.flatten(0, 1)

        def loss(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            logits = capped(logits, self.softcap)
            total, gradient = logits.new_zeros(()), None
            if weights.kl:
                assert wanted is not None
                assert teacher_head is not None
                kl, gradient = _kl_chunk(logits, capped(teacher_head(wanted[part]), self.softcap))
                scale = weights.kl / (windows * length)
                total, gradient = total + scale * kl, gradient.mul_(scale)
            if weights.cross_entropy:
                ce, more = _ce_chunk(logits, targets[part], counts[part])
                total, gradient = total + ce, more if gradient is None else gradient.add_(more)
            gradient = torch.zeros_like(logits) if gradient is None else gradient
            return total, gradient if self.softcap is None else gradient * (1 - (logits / self.softcap).square())

        return _HeadLoss.apply(hidden.flatten(0, 1), head.weight, getattr(head, "bias", None), loss, self.chunk)
