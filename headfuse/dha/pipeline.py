"""`--method dha`: the trained stages of the paper (DHA, arXiv 2406.06567, section 4), on the whole model in memory.

Search under the language-modelling loss -> distances of heads -> budgets and groups -> rounds of fusion under an
augmented Lagrangian -> averages of the ratios. The mathematics is in dha/ratios.py; docs/how-it-works/dha.md says
what the paper leaves open and what was chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from headfuse.config.fuse import FuseConfig
from headfuse.dha.basis import rebase
from headfuse.dha.loop import Training, nll, training_memory
from headfuse.dha.operator import MixedProjection, collapsed_weights, install, load_weights, single_heads, uninstall
from headfuse.dha.search import decide, distances, divide, sides_of
from headfuse.errors import UnsupportedModelError
from headfuse.estimates import average
from headfuse.models.families import architecture_of
from headfuse.models.loading import guard_embeddings, load_tokenizer, unembedded_tokens
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan, Groups
from headfuse.planning.planner import ProgressCallback, plan_options
from headfuse.text.calibration import CalibrationText
from headfuse.text.stream import TrainingText
from headfuse.training.teacher import LiveTeacher

logger = logging.getLogger(__name__)


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
    on_progress: ProgressCallback,
    trust_remote_code: bool = False,
) -> Trained:
    """Search, group, fuse and collapse; an interrupted run in `partial` goes on to the same result.

    Args:
        source: the opened source.
        streamed: the same, layer by layer, for the statistics that some options need.
        config: its `calibration.data` is what is trained on.
        text: windows for those statistics.
        partial: where states and the log go.
        plan: reviewed groups, instead of search and grouping.
        on_progress: called with phase, done and total steps.
        trust_remote_code: allow the source's own code.

    Raises:
        UnsupportedModelError: as `check_family`.
        HeadfuseError: when the loss is not finite, or a state cannot be written.
    """
    check_family(source)
    options, heads = config.dha, source.heads
    logger.warning("method dha trains the whole model in memory: about %.1f GB", training_memory(source, config) / 1e9)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    stream, model = _training_text(config, tokenizer), load_weights(source, streamed, trust_remote_code)
    guard_embeddings(model, unembedded_tokens(tokenizer, source.config.vocab_size), source.folder)
    before, teacher = nll(model, stream.validation), None
    if plan is not None and all(layer.untouched for layer in plan.layers):
        return Trained(plan, {}, before, before)
    if options.loss == "kl":
        teacher = LiveTeacher(load_weights(source, streamed, trust_remote_code), streamed.device, None, False)
    training = Training(partial, model, options, stream, teacher, on_progress)

    everything = [(tuple(range(heads.num_key_value_heads)),)] * (2 * heads.num_hidden_layers)
    if training.phase == 0 and plan is None:  # search (section 4.3): any two heads of a layer may mix
        sides = install(model, streamed, everything)
        training.run("search", sides, options.search_steps, 0, options.search_steps)
        training.costs = [distances(side, heads).tolist() for side in sides]
        uninstall(model, source, streamed, trust_remote_code)
    if plan is None:
        plan = training.plan or decide(
            source, streamed, plan_options(config), options.progressive, text, training.costs, on_progress
        )
    rounds = _rounds(plan, training.costs, config)
    if not any(rounds):  # the budget keeps every head: nothing is trained
        return Trained(plan, {}, before, before)
    training.plan = plan
    if options.start != "raw" and training.phase == 0:
        rebase(model, streamed, plan, text, options.start)
    sides = install(model, streamed, everything)
    mixed = _fuse(training, sides, rounds)
    after = nll(model, stream.validation)
    training.finish(heads=[len(side.weight) for side in sides], nll_mixed=average(mixed), nll=average(after))
    return Trained(plan, collapsed_weights(model, streamed), before, after)


def _training_text(config: FuseConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingText:
    """The text that is trained on, and the windows of it that are held out."""
    calibration = config.calibration
    windows = max(1, calibration.held_out_windows(calibration.samples))
    return TrainingText(
        calibration.data, tokenizer, calibration.sequence_length, config.seed, validation_windows=windows
    )


def _rounds(plan: FusionPlan, costs: Sequence[list[list[float]]], config: FuseConfig) -> list[list[Groups]]:
    """The groups of every round, for each side; none if it keeps all heads. Reviewed groups have no costs and take one
    round.
    """
    sides, heads = sides_of(plan), plan.heads.num_key_value_heads
    if not costs:
        return [[groups] if len(groups) < heads else [] for groups in sides]
    return [
        divide(cost, len(groups), config.grouping, config.dha.progressive, config.seed)
        for cost, groups in zip(costs, sides, strict=True)
    ]


def _fuse(
    training: Training, sides: Sequence[MixedProjection], rounds: Sequence[Sequence[Groups]]
) -> tuple[float, ...]:
    """Fusion (section 4.3) in rounds that halve the heads (appendix B.2), each with its collapse.

    At first the model is exactly the source.

    Args:
        training: takes the steps of all phases.
        sides: the fusion operators.
        rounds: as `_rounds` gives them.

    Returns:
        NLL of the held-out windows before the last collapse.
    """
    total, mixed = max(map(len, rounds)), tuple[float, ...]()
    steps = training.options.fusion_steps // total
    for number in range(total):
        for side, own in zip(sides, rounds, strict=True):
            side.group(own[number] if number < len(own) else single_heads(len(side.weight)))
        if training.phase <= number + 1:
            training.phase = number + 1
            training.run(f"fusion {number + 1} of {total}", sides, steps, number * steps, total * steps)
        if number == total - 1:
            mixed = nll(training.model, training.text.validation)
        for side in sides:
            side.collapse()
    for side in sides:
        side.group(single_heads(len(side.weight)))
    return mixed


def check_family(source: Source) -> None:
    """Raise UnsupportedModelError for a family whose keys and values are not two plain projections."""
    arch = architecture_of(source.heads.model_type)
    normed = arch.key_norm is not None and (arch.norm_option is None or getattr(source.config, arch.norm_option, False))
    plain = arch.packed is None and not normed and not arch.stacked and arch.rotary == "half"
    if not plain or arch.transposed or arch.legacy:
        raise UnsupportedModelError(
            f"method dha mixes plain key and value projections, which model_type {source.heads.model_type!r} has not",
            where=source.folder / "config.json",
            fix="use another method, such as subspace, or a model like llama, mistral or qwen2",
        )
