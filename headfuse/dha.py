"""`--method dha`: the trained stages of the paper (DHA, arXiv 2406.06567, section 4), on the whole model in memory.

Search under the language-modelling loss -> distances of heads -> budgets and groups -> rounds of fusion under an
augmented Lagrangian -> averages of the ratios. The mathematics is in fusion/dha.py; docs/dha.md says what the paper
leaves open and what was chosen.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

import headfuse
from headfuse.architectures import AttentionWeights, architecture_of
from headfuse.calibration import START_WEIGHT, CalibrationText, key_moments, value_moments
from headfuse.checkpoint import STATE, sync
from headfuse.config import DhaConfig, FuseConfig
from headfuse.distillation import LossWeights, Objective, model_states, window_nll
from headfuse.errors import CheckpointError, HeadfuseError, OutputError, UnsupportedModelError
from headfuse.fusion import FUSION_METHODS, dha
from headfuse.grouping import GROUPERS, anneal, canonical
from headfuse.loading import guard_embeddings, load_model, load_tokenizer, unembedded_tokens
from headfuse.plan import FusionPlan, Groups, HeadLayout, LayerPlan, head_of_source
from headfuse.planning import Progress, survey
from headfuse.sampling import average
from headfuse.source import Source
from headfuse.streaming import AttentionCapture, StreamedModel
from headfuse.teacher import LiveTeacher
from headfuse.text import Batch, TrainingText

logger = logging.getLogger(__name__)

LOG = "train_log.jsonl"
FROM_SEARCH = ("dha-greedy", "uniform")
"""Allocators that need no survey of the heads."""
FINAL_LEARNING_RATE = 0.1
LEAST_SCALE = 0.1
"""Channels of another basis are at least this large relative to the largest, so that the basis can be undone."""


@dataclass(frozen=True)
class Trained:
    """The plan and the trained weights by name; NLL of each held-out window before and after."""

    plan: FusionPlan
    weights: dict[str, torch.Tensor]
    held_out_before: tuple[float, ...]
    held_out_after: tuple[float, ...]


def train(
    source: Source,
    streamed: StreamedModel,
    config: FuseConfig,
    text: CalibrationText,
    partial: Path,
    plan: FusionPlan | None,
    on_progress: Progress,
    trust_remote_code: bool = False,
) -> Trained:
    """Search, group, fuse and collapse; an interrupted run in `partial` goes on to the same result.

    Args:
        source: the opened source.
        streamed: the same, layer by layer, for the statistics that some options need.
        config: its `calibration.data` is what is trained on.
        text: windows for those statistics.
        partial: where states and the log go.
        plan: groups that somebody reviewed, in the place of search and grouping.
        on_progress: called with phase, done and total steps.
        trust_remote_code: allow the source's own code.

    Raises:
        UnsupportedModelError: as `check_family`.
        HeadfuseError: when the loss is not finite, or a state cannot be written.
    """
    check_family(source)
    options, heads = config.dha, source.heads
    logger.warning("method dha trains the whole model in memory: about %.1f GB", training_memory(source, config) / 1e9)
    windows = max(1, config.calibration.held_out_windows(config.calibration.samples))
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    stream = TrainingText(
        config.calibration.data,
        tokenizer,
        config.calibration.sequence_length,
        config.seed,
        validation_windows=windows,
    )
    beyond = unembedded_tokens(tokenizer, source.config.vocab_size)
    model = _load(source, streamed, trust_remote_code)
    guard_embeddings(model, beyond, source.folder)
    before = nll(model, stream.validation)
    if plan is not None and all(layer.untouched for layer in plan.layers):
        return Trained(plan, {}, before, before)
    teacher = None
    if options.loss == "kl":
        teacher = LiveTeacher(_load(source, streamed, trust_remote_code), streamed.device, None, False)
    training = Training(partial, model, options, stream, teacher, on_progress)

    # Search (section 4.3): under the language-modelling loss alone, any two heads of a layer may mix
    everything = [(tuple(range(heads.num_key_value_heads)),)] * (2 * heads.num_hidden_layers)
    if training.phase == 0 and plan is None:
        sides = install(model, streamed, everything)
        training.run("search", sides, options.search_steps, 0, options.search_steps)
        training.costs = [distances(side, heads).tolist() for side in sides]
        uninstall(model, source, streamed, trust_remote_code)
    costs = training.costs
    if plan is None:
        plan = training.plan or decide(source, streamed, config, text, costs, on_progress)
        rounds = [
            divide(cost, len(groups), config.grouping, options.progressive, config.seed)
            for cost, groups in zip(costs, sides_of(plan), strict=True)
        ]
    else:
        rounds = [[groups] if len(groups) < heads.num_key_value_heads else [] for groups in sides_of(plan)]
    total = max(map(len, rounds))
    if not total:  # the budget keeps every head: nothing is trained
        return Trained(plan, {}, before, before)
    training.plan = plan

    # Fusion (section 4.3), in rounds that halve the heads (appendix B.2); at first the model is exactly the source
    if options.start != "raw" and training.phase == 0:
        rebase(model, streamed, plan, text, options.start)
    sides = install(model, streamed, everything)
    for number in range(total):
        for side, own in zip(sides, rounds, strict=True):
            groups = own[number] if number < len(own) else _alone(len(side.weight))
            side.group(groups)
        steps = options.fusion_steps // total
        if training.phase <= number + 1:
            training.phase = number + 1
            name = f"fusion {number + 1} of {total}"
            training.run(name, sides, steps, number * steps, total * steps)
        mixed = nll(model, stream.validation) if number == total - 1 else ()
        for side in sides:
            side.collapse()
    for side in sides:
        side.group(_alone(len(side.weight)))
    after = nll(model, stream.validation)
    training.finish(heads=[len(side.weight) for side in sides], nll_mixed=average(mixed), nll=average(after))
    return Trained(plan, collapsed_weights(model, streamed), before, after)


# ---------------------------------------------------------------- the model with fusion operators


class MixedProjection(nn.Module):
    """A key or value projection of m heads that gives every query head its own mixture of them (equation 5).

    Parameters `weight [m, d, D]`, `bias [m, d]` or None, `omega [n_q, m, d]`; output `[..., n_q d]`.
    """

    same: torch.Tensor
    start: torch.Tensor

    def __init__(self, stock: nn.Linear, readers: Sequence[int], head_dim: int) -> None:
        super().__init__()
        self.readers = list(readers)
        self.weight = nn.Parameter(stock.weight.detach().unflatten(0, (-1, head_dim)).clone())
        self.bias = (
            None if stock.bias is None else nn.Parameter(stock.bias.detach().unflatten(0, (-1, head_dim)).clone())
        )
        self.group(_alone(len(self.weight)))

    def group(self, groups: Groups) -> None:
        """Let the heads of each group mix, from the identity on."""
        self.groups, device = groups, self.weight.device
        start = dha.identity(self.readers, *self.weight.shape[:2]).to(device)
        self.omega = nn.Parameter(start.clone())
        self.register_buffer("start", start)
        self.register_buffer("same", dha.members(groups)[self.readers][:, :, None].to(device))

    def ratios(self) -> torch.Tensor:
        """omega, the identity outside the groups."""
        return torch.where(self.same, self.omega, self.start)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project `hidden [..., D]`."""
        omega = self.ratios()
        bias = None if self.bias is None else dha.fuse(omega, self.bias[..., None]).flatten()
        return F.linear(hidden, dha.fuse(omega, self.weight).flatten(0, 1), bias)

    def collapse(self) -> None:
        """Replace the heads of every group by one."""
        with torch.no_grad():
            omega = self.ratios()
            self.weight = nn.Parameter(dha.collapse(omega, self.weight, self.groups, self.readers))
            if self.bias is not None:
                bias = dha.collapse(omega, self.bias[..., None], self.groups, self.readers)[..., 0]
                self.bias = nn.Parameter(bias)
        owner = head_of_source(self.groups)
        self.readers = [owner[head] for head in self.readers]


def check_family(source: Source) -> None:
    """Raise UnsupportedModelError for a family whose keys and values are not two plain projections."""
    arch = architecture_of(source.heads.model_type)
    plain = arch.packed is None and arch.key_norm is None and not arch.stacked and arch.rotary == "half"
    if not plain or arch.transposed or arch.legacy:
        raise UnsupportedModelError(
            f"method dha mixes plain key and value projections, which model_type {source.heads.model_type!r} has not",
            where=source.folder / "config.json",
            fix="use another method, such as subspace, or a model like llama, mistral or qwen2",
        )


def _load(source: Source, streamed: StreamedModel, trust_remote_code: bool) -> PreTrainedModel:
    return load_model(source.folder, device=str(streamed.device), dtype="float32", trust_remote_code=trust_remote_code)


def install(model: PreTrainedModel, streamed: StreamedModel, groups: Sequence[Groups]) -> list[MixedProjection]:
    """Put fusion operators into a model: those of all keys, then those of all values."""
    arch, heads, found = streamed.arch, streamed.heads, list[MixedProjection]()
    readers = [heads.source_head(query) for query in range(heads.num_attention_heads)]
    for name in (arch.key, arch.value):
        for layer_idx in range(heads.num_hidden_layers):
            attention: Any = model.get_submodule(arch.attention_prefix(layer_idx))
            side = MixedProjection(getattr(attention, name), readers, heads.head_dim)
            side.group(groups[len(found)])
            setattr(attention, name, side)
            attention.num_key_value_groups = 1  # every query head has a key and a value of its own
            found.append(side)
    return found


def uninstall(model: PreTrainedModel, source: Source, streamed: StreamedModel, trust_remote_code: bool) -> None:
    """Make the model the source again: the search measures, fusion starts from the source."""
    fresh, arch, heads = _load(source, streamed, trust_remote_code), streamed.arch, streamed.heads
    for layer_idx in range(heads.num_hidden_layers):
        attention: Any = model.get_submodule(arch.attention_prefix(layer_idx))
        stock: Any = fresh.get_submodule(arch.attention_prefix(layer_idx))
        for name in (arch.key, arch.value):
            setattr(attention, name, getattr(stock, name))
    model.load_state_dict(fresh.state_dict())


def collapsed_weights(model: PreTrainedModel, streamed: StreamedModel) -> dict[str, torch.Tensor]:
    """The weights by the names of a checkpoint, projections as plain matrices."""
    names = [f"{side}.omega" for side, module in model.named_modules() if isinstance(module, MixedProjection)]
    dropped = {name.removesuffix("omega") + part for name in names for part in ("omega", "start", "same")}
    mixed = tuple(name.removesuffix("omega") for name in names)
    return {
        name: tensor.flatten(0, 1) if name.startswith(mixed) else tensor
        for name, tensor in model.state_dict().items()
        if name not in dropped
    }


@torch.no_grad()
def nll(model: PreTrainedModel, windows: torch.Tensor) -> tuple[float, ...]:
    """NLL per token of each of the windows `[n, length]`."""
    found = list[float]()
    for batch in windows.to(model.device).split(8):
        found += window_nll(model_states(model, batch).last, model.get_output_embeddings(), batch).tolist()
    return tuple(found)


# ---------------------------------------------------------------- what the search tells


def distances(side: MixedProjection, heads: HeadLayout) -> torch.Tensor:
    """L_head of every two source heads `[n, n]`, the mean over their query heads."""
    with torch.no_grad():
        n = heads.num_key_value_heads
        loss = dha.head_loss(side.ratios(), n).double().cpu()
        loss = loss.view(n, heads.queries_per_head, n, heads.queries_per_head).mean((1, 3))
        return loss.fill_diagonal_(0)


def decide(
    source: Source,
    streamed: StreamedModel,
    config: FuseConfig,
    text: CalibrationText,
    costs: list[list[list[float]]],
    on_progress: Progress,
) -> FusionPlan:
    """Budgets and groups: what the search found, or another allocator's table.

    Args:
        source: the opened source.
        streamed: for the survey of other allocators.
        config: the options.
        text: windows for it.
        costs: `[2 layers, n, n]` distances, keys of all layers first.
        on_progress: as for `train`.
    """
    n, layers = source.heads.num_key_value_heads, source.heads.num_hidden_layers
    if config.budget.allocator in FROM_SEARCH:
        losses = [sum(map(sum, cost)) / 2 for cost in costs]  # of a layer: the sum over its pairs
        table = [[loss * (n - count) / max(1, n - 1) for count in range(1, n + 1)] for loss in losses]
    else:
        surveys = survey(source, streamed, text, config, on_progress)
        table = [s.costs[side].row() for side in ("key", "value") for s in surveys if s.costs]
    budget = config.rules.allocate(config.budget.allocator if table else "uniform", source.heads, table or None)
    groups, alone = list[Groups](), _alone(n)
    for cost, count in zip(costs, budget.key_heads + budget.value_heads, strict=True):
        rounds = divide(cost, count, config.grouping, config.dha.progressive, config.seed)
        groups.append(reduce(_merged, rounds, alone))
    return FusionPlan(
        headfuse_version=headfuse.__version__,
        source=source.identity(),
        heads=source.heads,
        layout=config.layout,
        method=config.method,
        allocator=config.budget.allocator,
        budget=config.budget.label,
        layers=tuple(
            LayerPlan(layer_idx=i, key_groups=groups[i], value_groups=groups[layers + i]) for i in range(layers)
        ),
    )


def sides_of(plan: FusionPlan) -> list[Groups]:
    """The groups of all layers' keys, then of all layers' values."""
    return [layer.key_groups for layer in plan.layers] + [layer.value_groups for layer in plan.layers]


def divide(cost: Sequence[Sequence[float]], count: int, grouping: str, progressive: bool, seed: int) -> list[Groups]:
    """Rounds of groups, each over the heads that the one before it leaves, until `count` heads are left.

    A progressive round divides the heads into pairs and fuses those of the smallest loss; of heads that are fused
    already it knows the mean of the distances that the search measured.
    """
    table = torch.tensor(cost, dtype=torch.float64)
    heads, rounds = _alone(len(table)), list[Groups]()
    while len(heads) > count:
        m = len(heads)
        between = [[float(table[list(a)][:, list(b)].mean()) for b in heads] for a in heads]
        number = -(-m // 2) if progressive else count
        equal = m % number == 0
        groups = (
            anneal(between, number, equal, seed) if grouping == "anneal" else GROUPERS[grouping](between, number, equal)
        )
        if progressive:
            pairs = sorted((group[:2] for group in groups if len(group) > 1), key=lambda p: between[p[0]][p[1]])
            fused = pairs[: m - max(count, number)]
            alone = set(range(m)) - {head for pair in fused for head in pair}
            groups = canonical([*fused, *((head,) for head in alone)])
        rounds.append(groups)
        heads = _merged(heads, groups)
    return rounds


def _alone(num_heads: int) -> Groups:
    return tuple((j,) for j in range(num_heads))


def _merged(heads: Groups, groups: Groups) -> Groups:
    """The source heads of every head after a round."""
    return tuple(tuple(sorted(j for head in group for j in heads[head])) for group in groups)


# ---------------------------------------------------------------- another basis to mix heads in


@torch.no_grad()
def rebase(
    model: PreTrainedModel, streamed: StreamedModel, plan: FusionPlan, text: CalibrationText, method: str
) -> None:
    """Turn every head into the basis that another method's read maps give, which changes no output.

    The source's head is R fused in that method, so R^-1 source are heads that may be averaged.
    """
    arch, heads = streamed.arch, streamed.heads
    windows, starts = streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)
    for layer in plan.layers:
        tensors, captures = streamed.layer_tensors(layer.layer_idx), list[AttentionCapture]()
        with streamed.layer(layer.layer_idx, tensors) as run:
            windows, starts = run(windows, captures), run(starts, captures)
        own = AttentionWeights.of_layer({n: t.double() for n, t in tensors.items()}, arch, heads)
        maps = FUSION_METHODS[method]
        keys = maps.key_maps(layer.key_groups, key_moments(captures, heads)).read
        values = maps.value_maps(layer.value_groups, value_moments(captures, own.output, heads, None)).read
        length = keys.square().sum(1).sqrt()  # of every channel: maps of keys act on whole rotary planes
        floor = LEAST_SCALE * length.amax(1, keepdim=True)
        keys = torch.where((length > 1e-9)[:, None], keys / length.clamp_min(1e-9)[:, None], _eye_like(keys))
        keys = keys * length.clamp_min(floor)[:, None]
        u, s, v = torch.linalg.svd(values)
        values = u * s.clamp_min(LEAST_SCALE * s.amax(1, keepdim=True))[:, None] @ v
        reads = [heads.source_head(query) for query in range(heads.num_attention_heads)]
        own.query = keys[reads].mT @ own.query
        own.output = torch.einsum("Dhd,hde->Dhe", own.output, values[reads])
        own.key, own.value = torch.linalg.solve(keys, own.key), torch.linalg.solve(values, own.value)
        if own.query_bias is not None:
            own.query_bias = (keys[reads].mT @ own.query_bias[..., None])[..., 0]
        if own.key_bias is not None:
            own.key_bias = torch.linalg.solve(keys, own.key_bias[..., None])[..., 0]
        if own.value_bias is not None:
            own.value_bias = torch.linalg.solve(values, own.value_bias[..., None])[..., 0]
        attention = model.get_submodule(arch.attention_prefix(layer.layer_idx))
        state = {name: tensor.float() for name, tensor in own.to_tensors(arch, heads).items()}
        attention.load_state_dict(state, strict=False)


def _eye_like(maps: torch.Tensor) -> torch.Tensor:
    return torch.eye(maps.shape[-1], dtype=maps.dtype).expand_as(maps)


# ---------------------------------------------------------------- the loop


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
        on_progress: Progress,
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
        self._load()
        self._keep_log()

    def run(self, name: str, sides: list[MixedProjection], steps: int, offset: int, total: int) -> None:
        """Take the steps of one phase.

        Args:
            name: of the phase.
            sides: the fusion operators.
            steps: of this phase at most; without fusion (phase 0) exactly.
            offset: steps of its kind that lie before it.
            total: and in all, over which the learning rates fall.
        """
        options, fuses = self.options, self.phase > 0
        omegas = [side.omega for side in sides]
        known = set(map(id, omegas))
        weights = [p for p in self.model.parameters() if id(p) not in known]
        multiplier = nn.Parameter(torch.tensor(options.lambda_start, device=self.model.device))
        groups = [
            {"params": weights, "peak": options.learning_rate},
            {"params": omegas, "peak": options.omega_learning_rate},
            {"params": [multiplier], "peak": options.lambda_learning_rate, "maximize": True},
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        if self.saved is not None:
            self.model.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(self.saved["optimizer"])
            multiplier.data.copy_(self.saved["multiplier"])
            ended, self.saved = self.saved["ended"], None
            if ended:
                self.step = 0
                return
        batches = self.text.batches(options.batch_size, self.read)
        warmup = options.k or max(1, steps // 2)
        while self.step < steps:
            rate = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (
                1 + math.cos(math.pi * (offset + self.step) / total)
            )
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            batch = next(batches)
            lm = self._language_loss(batch)
            loss = self.fusion_loss(sides)
            goal = dha.target(self.step, options.b, warmup)
            if fuses:  # equation 8: max over lambda, min over weights and omega
                (multiplier * (loss - goal).clamp_min(0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            multiplier.data.clamp_(min=0)
            self.step, self.steps_done, self.read = self.step + 1, self.steps_done + 1, batch.state
            fusion = loss.item()
            values = {"lm": lm, "fusion": fusion, "target": goal if fuses else None, "lambda": multiplier.item()}
            self._log(phase=name, step=self.step, tokens=self._tokens(), **values, learning_rate=rate)
            if not math.isfinite(lm) or not math.isfinite(fusion):
                raise HeadfuseError(
                    f"the loss is {lm}, the fusion loss {fusion}, at step {self.step} of {name}",
                    where=self.folder,
                    fix="give lower learning rates in the block `dha` of the config",
                )
            ended = self.step == steps or (fuses and fusion < options.stop)
            if ended or self.step % options.checkpoint_every == 0:
                self._save(optimizer, multiplier, ended)
            self.on_progress(name, self.step, steps)
            if ended:
                break
        left = self.fusion_loss(sides).item()
        if fuses and left >= options.stop:
            logger.warning("%s ends with a fusion loss of %.2g: averaging changes the model", name, left)
        self.step = 0

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
        """Say in the log what came out."""
        self._log(phase="collapsed", step=0, tokens=self._tokens(), **values)

    def _tokens(self) -> int:
        return self.steps_done * self.options.batch_size * self.text.sequence_length

    @property
    def _state(self) -> Path:
        return self.folder / STATE / "dha.pt"

    def _save(self, optimizer: torch.optim.Optimizer, multiplier: torch.Tensor, ended: bool) -> None:
        fresh = self._state.with_suffix(".new")
        fresh.parent.mkdir(exist_ok=True)
        try:
            torch.save(
                {
                    "phase": self.phase, "step": self.step, "steps_done": self.steps_done, "ended": ended,
                    "costs": self.costs, "plan": self.plan and self.plan.to_json(), "read": self.read,
                    "model": self.model.state_dict(), "optimizer": optimizer.state_dict(),
                    "multiplier": multiplier.detach(),
                },
                fresh,
            )  # fmt: skip
        except RuntimeError as error:  # how torch.save reports a full disk
            reason = f"the state after step {self.step} cannot be written: {error}"
            raise OutputError(reason, where=self.folder, fix="free some space, then go on with --resume") from None
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

    def _log(self, **record: Any) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def _keep_log(self) -> None:
        """Drop the lines of steps that the state does not hold."""
        path = self.folder / LOG
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(lines[: self.steps_done]), encoding="utf-8")


def training_memory(source: Source, config: FuseConfig) -> int:
    """Bytes of weights, gradients, two moments, a teacher, and the activations of a micro-batch."""
    heads, options = source.heads, config.dha
    weights = sum(math.prod(shape) for shape in source.checkpoint.shapes.values())
    tokens = min(options.batch_size, options.micro_batch_size) * config.calibration.sequence_length
    wide = getattr(source.config, "intermediate_size", 4 * heads.hidden_size)
    kept = 8 * heads.hidden_size + 6 * heads.num_attention_heads * heads.head_dim + 4 * wide  # of a token and layer
    copies = 4 + (options.loss == "kl")
    return 4 * (copies * weights + tokens * kept * heads.num_hidden_layers)
