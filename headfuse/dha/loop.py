"""The training loop of the search and fusion stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headfuse.checkpoint.disk import sync
from headfuse.checkpoint.interrupted import STATE
from headfuse.config.fuse import DhaConfig, FuseConfig
from headfuse.dha import ratios as dha
from headfuse.dha.operator import MixedProjection
from headfuse.errors import CheckpointError, HeadfuseError
from headfuse.models.logits import nll_in_batches, window_nll
from headfuse.models.source import Source
from headfuse.models.states import model_states, softcap
from headfuse.plan import FusionPlan
from headfuse.planning.planner import ProgressCallback
from headfuse.text.stream import Batch, TrainingText
from headfuse.training.objective import LossWeights, Objective
from headfuse.training.run import RunLog, saving
from headfuse.training.schedule import cosine
from headfuse.training.teacher import LiveTeacher

logger = logging.getLogger(__name__)

FINAL_LEARNING_RATE = 0.1


def nll(model: PreTrainedModel, windows: torch.Tensor) -> tuple[float, ...]:
    """NLL per token of each of the windows `[n, length]`."""

    def of_batch(batch: torch.Tensor) -> torch.Tensor:
        head, cap = model.get_output_embeddings(), softcap(model.config)
        return window_nll(model_states(model, batch).last, head, batch, cap)

    return tuple(nll_in_batches(windows, model.device, of_batch).tolist())


class Training:
    """Steps of all phases on one stream of text, their log, and the state from which an interrupted run goes on.

    Phase 0 is the search, the others are the rounds of fusion. A state holds everything that the steps after it read.
    """

    def __init__(
        self,
        partial: Path,
        model: PreTrainedModel,
        options: DhaConfig,
        text: TrainingText,
        teacher: LiveTeacher | None,
        on_progress: ProgressCallback,
    ) -> None:
        self.folder, self.options, self.on_progress, self.teacher = partial, options, on_progress, teacher
        self.model, self.text = model, text
        weights = LossWeights(float(teacher is not None), float(teacher is None), 0.0)
        self.objective = Objective(model, None if teacher is None else teacher.head, weights)
        self.phase = self.step = self.steps_done = 0
        self.costs: list[list[list[float]]] = []
        self.plan: FusionPlan | None = None
        self.read: dict[str, Any] | None = None
        self.saved: dict[str, Any] | None = None
        self._log = RunLog(partial)
        self._load()
        self._log.keep(lambda number, record: number < self.steps_done)

    def run(self, name: str, sides: Sequence[MixedProjection], steps: int, offset: int, total: int) -> None:
        """Take the steps of one phase.

        Args:
            name: of the phase.
            sides: the fusion operators.
            steps: of this phase at most; without fusion (phase 0) exactly.
            offset: steps of its kind that lie before it.
            total: and in all, over which the learning rates fall.
        """
        options, fuses = self.options, self.phase > 0
        multiplier = nn.Parameter(torch.tensor(options.lambda_start, device=self.model.device))
        optimizer = self._optimizer(sides, multiplier)
        if self._restore(optimizer, multiplier):
            self.step = 0
            return
        batches = self.text.batches(options.batch_size, self.read)
        warmup = options.k or max(1, steps // 2)
        ended = False
        while self.step < steps and not ended:
            rate = cosine(math.pi * (offset + self.step) / total, FINAL_LEARNING_RATE)
            goal = dha.target(self.step, options.b, warmup)
            fusion = self._take(name, next(batches), sides, optimizer, multiplier, rate, goal)
            ended = self.step == steps or (fuses and fusion < options.stop)
            if ended or self.step % options.checkpoint_every == 0:
                self._save(optimizer, multiplier, ended)
            self.on_progress(name, self.step, steps)
        left = self.fusion_loss(sides).item()
        if fuses and left >= options.stop:
            logger.warning("%s ends with a fusion loss of %.2g: averaging changes the model", name, left)
        self.step = 0

    def _optimizer(self, sides: Sequence[MixedProjection], multiplier: nn.Parameter) -> torch.optim.Optimizer:
        """Adam over weights, ratios and the multiplier, which rises; each group has a peak of the learning rate."""
        omegas = [side.omega for side in sides]
        known = set(map(id, omegas))
        weights = [p for p in self.model.parameters() if id(p) not in known]
        groups = [
            {"params": weights, "peak": self.options.learning_rate},
            {"params": omegas, "peak": self.options.omega_learning_rate},
            {"params": [multiplier], "peak": self.options.lambda_learning_rate, "maximize": True},
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.95))

    def _take(
        self,
        name: str,
        batch: Batch,
        sides: Sequence[MixedProjection],
        optimizer: torch.optim.Optimizer,
        multiplier: nn.Parameter,
        rate: float,
        goal: float,
    ) -> float:
        """Take one step at a rate relative to the peaks, and log it; returns the fusion loss before it.

        Raises:
            HeadfuseError: when a loss is not finite.
        """
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        lm = self._language_loss(batch)
        loss = self.fusion_loss(sides)
        if self.phase > 0:  # equation 8: max over lambda, min over weights and omega
            (multiplier * (loss - goal).clamp_min(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        multiplier.data.clamp_(min=0)
        self.step, self.steps_done, self.read = self.step + 1, self.steps_done + 1, batch.state
        fusion = loss.item()
        target = goal if self.phase > 0 else None
        values = {"lm": lm, "fusion": fusion, "target": target, "lambda": multiplier.item()}
        self._log.add(phase=name, step=self.step, tokens=self._tokens(), **values, learning_rate=rate)
        if not math.isfinite(lm) or not math.isfinite(fusion):
            raise HeadfuseError(
                f"the loss is {lm}, the fusion loss {fusion}, at step {self.step} of {name}",
                where=self.folder,
                fix="give lower learning rates in the block `dha` of the config",
            )
        return fusion

    def fusion_loss(self, sides: Sequence[MixedProjection]) -> torch.Tensor:
        """L_fusion (equation 7): the mean over all pairs, or the paper's sum."""
        found = [dha.fusion_loss(side.ratios(), side.groups, side.readers) for side in sides]
        total, pairs = torch.stack([loss for loss, _ in found]).sum(), sum(count for _, count in found)
        return total * sides[0].omega.shape[-1] if self.options.raw_fusion_loss else total / max(1, pairs)

    def _language_loss(self, batch: Batch) -> float:
        """L_lm of one batch, its gradient left in the weights."""
        total, parts = 0.0, batch.windows.to(self.model.device).split(self.options.micro_batch_size)
        for part in parts:
            states = None if self.teacher is None else self.teacher.states(part, None)
            loss = self.objective(part, states) * (len(part) / len(batch.windows))
            loss.backward()
            total += loss.item()
        return total

    def finish(self, **values: Any) -> None:
        """Log the result."""
        self._log.add(phase="collapsed", step=0, tokens=self._tokens(), **values)

    def _tokens(self) -> int:
        return self.steps_done * self.options.batch_size * self.text.sequence_length

    @property
    def _state(self) -> Path:
        return self.folder / STATE / "dha.pt"

    def _save(self, optimizer: torch.optim.Optimizer, multiplier: torch.Tensor, ended: bool) -> None:
        fresh = self._state.with_suffix(".new")
        fresh.parent.mkdir(exist_ok=True)
        state = {
            "phase": self.phase, "step": self.step, "steps_done": self.steps_done, "ended": ended,
            "costs": self.costs, "plan": self.plan and self.plan.to_json(), "read": self.read,
            "model": self.model.state_dict(), "optimizer": optimizer.state_dict(),
            "multiplier": multiplier.detach(),
        }  # fmt: skip
        with saving(fresh, self.folder, f"the state after step {self.step}"):
            torch.save(state, fresh)
        sync(fresh)
        fresh.replace(self._state)

    def _load(self) -> None:
        if not self._state.exists():
            return
        try:
            saved = torch.load(self._state, map_location=self.model.device, weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise CheckpointError(
                f"the state cannot be read: {error}", where=self._state, fix="start anew with --overwrite"
            ) from None
        self.saved = saved
        for name in ("phase", "step", "steps_done", "costs", "read"):
            setattr(self, name, saved[name])
        self.plan = saved["plan"] and FusionPlan.from_json(saved["plan"])

    def _restore(self, optimizer: torch.optim.Optimizer, multiplier: torch.Tensor) -> bool:
        """Restore the state of an interrupted run, if there is one; return whether its phase had ended."""
        if self.saved is None:
            return False
        self.model.load_state_dict(self.saved["model"])
        optimizer.load_state_dict(self.saved["optimizer"])
        multiplier.data.copy_(self.saved["multiplier"])
        ended, self.saved = bool(self.saved["ended"]), None
        return ended


def training_memory(source: Source, config: FuseConfig) -> int:
    """Bytes of weights, gradients, two moments, a teacher, and the activations of a micro-batch."""
    heads, options = source.heads, config.dha
    weights = sum(math.prod(shape) for shape in source.checkpoint.shapes.values())
    tokens = min(options.batch_size, options.micro_batch_size) * config.calibration.sequence_length
    wide = getattr(source.config, "intermediate_size", 4 * heads.hidden_size)
    kept = 8 * heads.hidden_size + 6 * heads.num_attention_heads * heads.head_dim + 4 * wide  # of a token and layer
    copies = 4 + (options.loss == "kl")
    return 4 * (copies * weights + tokens * kept * heads.num_hidden_layers)
