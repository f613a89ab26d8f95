"""The training losses: divergence from a teacher over the full vocabulary, cross-entropy, hidden states, layers.

Everything that reads logits goes through the head in chunks of tokens, and the gradient of a chunk is computed with its
loss: no logits are kept, and none are computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_CHUNK_LOGITS, _CHUNK_TOKENS = 2**22, 256
"""Logits are computed in chunks of at most so many, or of so few tokens: small blocks of memory are used again."""


def kl_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Forward divergence KL(teacher || student), summed over tokens; both logits are `[tokens, vocabulary]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_student = F.log_softmax(logits.to(dtype), dim=-1)
    log_teacher = F.log_softmax(teacher_logits.to(dtype), dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


# ---------------------------------------------------------------- losses of logits, in chunks


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


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are computed at once."""
    return max(_CHUNK_TOKENS, _CHUNK_LOGITS // vocabulary)


@torch.no_grad()
def window_nll(hidden: torch.Tensor, head: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean NLL of the predictions inside each window, `[windows]`, float64.

    `hidden [windows, length, D]` is what the head reads, `batch [windows, length]` the tokens.
    """
    states, targets = hidden[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
    weight: Any = head.weight
    size = chunk_tokens(weight.shape[0])
    chunks = zip(states.split(size), targets.split(size), strict=True)
    losses = [F.cross_entropy(head(part).float(), wanted, reduction="none") for part, wanted in chunks]
    # float32 first: mps has no float64
    return torch.cat(losses).view(len(batch), -1).cpu().double().mean(dim=1)


# ---------------------------------------------------------------- what the layers compute


@dataclass(frozen=True)
class States:
    """What a model computes on a batch, `[windows, length, D]` each.

    `last` is what the head reads; `inputs` and `outputs` are those of every decoder layer, empty unless asked for.
    """

    last: torch.Tensor
    inputs: tuple[torch.Tensor, ...] = ()
    outputs: tuple[torch.Tensor, ...] = ()


def model_states(
    model: PreTrainedModel,
    batch: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    layers: bool = False,
    inputs: tuple[torch.Tensor, ...] | None = None,
) -> States:
    """Run a model without its head.

    Args:
        model: a causal language model.
        batch: token ids `[windows, length]`.
        positions: of the tokens in their documents (see `document_positions`); None for one document a window.
        layers: keep the inputs and outputs of the layers.
        inputs: what each layer reads in the place of the output of the layer before it.
    """
    recording = _recorded(model, inputs) if layers or inputs is not None else contextlib.nullcontext(_Seen())
    with recording as seen:
        last = model.base_model(input_ids=batch, position_ids=positions, use_cache=False).last_hidden_state
    order = sorted(seen)
    return States(last * logit_scale(model.config), tuple(seen[i][0] for i in order), tuple(seen[i][1] for i in order))


_Seen = dict[int, tuple[torch.Tensor, torch.Tensor]]


@contextlib.contextmanager
def _recorded(model: PreTrainedModel, inputs: tuple[torch.Tensor, ...] | None) -> Iterator[_Seen]:
    seen = _Seen()
    handles = []
    for layer_idx, layer in enumerate(decoder_layers(model)):

        def replace(_: nn.Module, args: Any, kwargs: Any, layer_idx: int = layer_idx) -> Any:
            if inputs is None:
                return None
            if args:
                return (inputs[layer_idx], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": inputs[layer_idx]}

        def record(_: nn.Module, args: Any, kwargs: Any, output: Any, layer_idx: int = layer_idx) -> None:
            read = args[0] if args else kwargs["hidden_states"]
            seen[layer_idx] = read, output[0] if isinstance(output, tuple) else output

        handles.append(layer.register_forward_pre_hook(replace, with_kwargs=True))
        handles.append(layer.register_forward_hook(record, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def logit_scale(config: PreTrainedConfig) -> float:
    """What a family multiplies its logits by (cohere, granite); the same on the states that the head reads."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, whatever its family calls them."""
    count = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def document_positions(batch: torch.Tensor, eos: int) -> torch.Tensor:
    """The place of every token in its document, `[windows, length]`; EOS is the last token of one.

    transformers makes a block-diagonal mask of positions that start anew, in every attention implementation.
    """
    index = torch.arange(batch.shape[1], device=batch.device).expand_as(batch)
    starts = F.pad(batch[:, :-1] == eos, (1, 0))
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def relative_error(states: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Squared error over squared size, per token, then the mean over tokens and layers.

    Per token: the states of an attention sink are a thousand times larger than the others.
    """
    errors = [
        ((have.float() - want.float()).square().sum(-1) / want.float().square().sum(-1).clamp_min(1e-6)).mean()
        for have, want in zip(states, wanted, strict=True)
    ]
    return torch.stack(errors).mean()


# ---------------------------------------------------------------- the objective


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts."""

    kl: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0


class Objective(nn.Module):
    """A model with its training loss; one module, so that all that needs gradients is in what accelerate wraps.

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
            return window_nll(mine.last, head, batch)
        loss = self._of_logits(mine.last, head, batch, teacher)
        if self.weights.hidden:
            assert teacher is not None
            loss = loss + self.weights.hidden * relative_error(mine.outputs, teacher.outputs)
        return loss

    def tie_weights(self) -> None:
        """Tie the model's weights again, which sharding parts."""
        self.model.tie_weights()

    def _of_logits(
        self, hidden: torch.Tensor, head: nn.Module, batch: torch.Tensor, teacher: States | None
    ) -> torch.Tensor:
        """Divergence at every token, cross-entropy at every token that has a next one in the window."""
        windows, length = batch.shape
        (teacher_head,), weights = self._teacher_head, self.weights
        targets = F.pad(batch[:, 1:], (0, 1)).flatten()
        # the last token of a window predicts nothing: its weight is 0
        counts = F.pad(batch.new_ones((windows, length - 1), dtype=torch.float32), (0, 1)).flatten()
        counts = counts * (weights.cross_entropy / (windows * (length - 1)))
        wanted = None if teacher is None else teacher.last.flatten(0, 1)

        def loss(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            total, gradient = logits.new_zeros(()), None
            if weights.kl:
                assert wanted is not None
                assert teacher_head is not None
                kl, gradient = _kl_chunk(logits, teacher_head(wanted[part]))
                scale = weights.kl / (windows * length)
                total, gradient = total + scale * kl, gradient.mul_(scale)
            if weights.cross_entropy:
                ce, more = _ce_chunk(logits, targets[part], counts[part])
                total, gradient = total + ce, more if gradient is None else gradient.add_(more)
            return total, gradient if gradient is not None else torch.zeros_like(logits)

        return _HeadLoss.apply(hidden.flatten(0, 1), head.weight, getattr(head, "bias", None), loss, self.chunk)
