"""The conversion, top to bottom: checkpoint and text -> survey -> plan -> fused layers -> folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from headfuse.checkpoint.output import output_folder, read_resume, write_resume
from headfuse.checkpoint.reader import Checkpoint
from headfuse.config.fuse import FuseConfig
from headfuse.conversion.output import open_writer, write_beside_weights, write_config
from headfuse.conversion.preflight import prepare
from headfuse.conversion.refine import REFINED, Targets, refine, refines
from headfuse.conversion.result import FuseResult, Stage
from headfuse.conversion.resume import FinishedLayers, resumed_plan
from headfuse.dha import pipeline as dha
from headfuse.fusion import FUSION_METHODS
from headfuse.fusion.layer import fuse_layer
from headfuse.layouts import LAYOUTS
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture
from headfuse.models.decoder_layers import DecoderLayers, HiddenStates
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan, LayerPlan
from headfuse.planning.planner import ProgressCallback, make_plan, survey
from headfuse.planning.review import adopt
from headfuse.text.calibration import START_WEIGHT, CalibrationText

logger = logging.getLogger(__name__)


def fuse(
    model: str,
    config: FuseConfig | None = None,
    *,
    output: Path | None = None,
    plan: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    on_progress: ProgressCallback = lambda phase, done, total: None,
) -> FuseResult:
    """Fuse the key heads and value heads of a model and write the result as a checkpoint folder.

    Args:
        model: folder or hub id of a model of a supported family (docs/architectures.md).
        config: every option; the defaults keep a quarter of the KV cache.
        output: default `<model>-headfuse-<budget>` beside the model; in the working directory for one of the hub.
        plan: a reviewed plan.json that replaces budget and grouping.
        overwrite: replace an existing output.
        resume: go on with an interrupted conversion.
        device: where layers are computed.
        dtype: of the written weights; default the source's.
        trust_remote_code: allow the source's own code.
        on_progress: called with phase, done and total layers.

    Raises:
        HeadfuseError: for every kind of bad input; nothing appears under the output name.
    """
    prepared = prepare(
        model, config, output=output, plan=plan, overwrite=overwrite, resume=resume, device=device, dtype=dtype,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    source, config, output, text = prepared.source, prepared.config, prepared.output, prepared.text
    ready = prepared.plan and adopt(prepared.plan, source)
    options = {**prepared.options, "plan": None if ready is None else ready.to_json()}
    trained = FUSION_METHODS[config.method].trained
    if trained:
        options["source"] = source.identity().fingerprint
    streamed = StreamedModel(source.checkpoint, source.config, prepared.device)
    with output_folder(output, overwrite=overwrite, resume=resume, reads=[source.folder]) as partial:
        found = resumed_plan(partial, source, options)
        if trained:
            training = _train(partial, source, streamed, text, config, ready, options, on_progress, trust_remote_code)
            return _write_trained(partial, output, source, streamed, training, config, options)
        ready = found or ready or make_plan(source, config, survey(source, streamed, text, config, on_progress))
        writer, done = open_writer(source, streamed, ready, partial, options)
        write_config(partial, source, ready, dtype)
        as_written = LAYOUTS[ready.layout].config(streamed.config.to_dict(), ready)
        guard = DecoderLayers(as_written, streamed.arch, writer, streamed.device)
        before, closed_form, last = _convert(streamed, guard, text, ready, done, on_progress)
        stages = [closed_form]
        if refines(config, ready, before, closed_form) or (partial / REFINED).exists():
            with torch.no_grad():
                targets = Targets(text.statistics, streamed.last_hidden_state(last.hidden))
            stages = refine(partial, streamed, guard, done, ready, text, targets, closed_form, config, on_progress)
        itemsize = next(iter(writer.dtypes.values())).itemsize
        kv_bytes = source.heads.kv_bytes_per_token(itemsize), ready.kv_bytes_per_token(itemsize)
        result = FuseResult(output, ready, tuple(stages), before, *kv_bytes)
        write_beside_weights(partial, source, result, config, writer)
        Checkpoint(partial)  # what was written opens again: headers and index agree
    return result


def _train(
    partial: Path,
    source: Source,
    streamed: StreamedModel,
    text: CalibrationText,
    config: FuseConfig,
    plan: FusionPlan | None,
    options: dict[str, Any],
    on_progress: ProgressCallback,
    trust_remote_code: bool,
) -> dha.Trained:
    """The trained stages of method dha; resumable from their first step on."""
    if read_resume(partial, "fuse") is None:
        write_resume(partial, "fuse", {"options": options})
    return dha.train(source, streamed, config, text, partial, plan, on_progress, trust_remote_code)


def _write_trained(
    partial: Path,
    output: Path,
    source: Source,
    streamed: StreamedModel,
    trained: dha.Trained,
    config: FuseConfig,
    options: dict[str, Any],
) -> FuseResult:
    """Write trained weights, where nothing was trained the source's, as the other methods' are written."""
    writer, _ = open_writer(source, streamed, trained.plan, partial, options)
    for name in writer.shapes:
        tensor = trained.weights.get(name)
        writer.write(name, source.checkpoint.read(name) if tensor is None else tensor)
    write_config(partial, source, trained.plan, options["dtype"])
    itemsize = next(iter(writer.dtypes.values())).itemsize
    kv_bytes = source.heads.kv_bytes_per_token(itemsize), trained.plan.kv_bytes_per_token(itemsize)
    stages = (Stage("trained", trained.held_out_after),)
    result = FuseResult(output, trained.plan, stages, trained.held_out_before, *kv_bytes)
    write_beside_weights(partial, source, result, config, writer)
    Checkpoint(partial)
    return result


def _convert(
    streamed: StreamedModel,
    guard: DecoderLayers,
    text: CalibrationText,
    plan: FusionPlan,
    done: FinishedLayers,
    on_progress: ProgressCallback,
) -> tuple[tuple[float, ...], Stage, HiddenStates]:
    """Fuse layer after layer.

    Returns the source's NLL on each held-out window, the stage, and what the source made of the statistics windows.
    """
    windows, starts = streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)
    before = after = streamed.embed(text.held_out)
    for layer in plan.layers:
        (windows, starts, before), written = _convert_layer(streamed, (windows, starts, before), layer, plan, done)
        if len(after):
            after = guard.run(layer.layer_idx, after, written)
        del written  # not beside the next layer
        on_progress("fuse", layer.layer_idx + 1, len(plan.layers))
    stage = Stage("closed form", streamed.nll(after, text.held_out))
    return streamed.nll(before, text.held_out), stage, windows


def _convert_layer(
    streamed: StreamedModel,
    inputs: tuple[HiddenStates, HiddenStates, HiddenStates],
    layer: LayerPlan,
    plan: FusionPlan,
    done: FinishedLayers,
) -> tuple[tuple[HiddenStates, HiddenStates, HiddenStates], dict[str, torch.Tensor]]:
    """Fuse and write one layer, unless that is done; what the source's makes of its inputs, and what was written.

    The first two inputs are those of the statistics.
    """
    arch, method, layout = streamed.arch, FUSION_METHODS[plan.method], LAYOUTS[plan.layout]
    prefix = arch.layer_prefix(layer.layer_idx) + "."
    tensors, captures = streamed.layer_tensors(layer.layer_idx), list[AttentionCapture]()
    weights = AttentionWeights.of_layer(tensors, arch, plan.heads)
    windows, starts, before = inputs
    with streamed.layer(layer.layer_idx, tensors) as run:
        outputs = run(windows, captures), run(starts, captures), run(before, None)
    if layer.layer_idx in done.layers:
        return outputs, {}
    if not layer.untouched:
        weights = fuse_layer(weights, captures, layer, plan.heads, method)
    tensors = layout.arrange(weights, layer, plan).in_layer(tensors, arch, plan.heads, layout.stored(arch))
    written = {prefix + name: tensors[name].to(done.writer.dtypes[prefix + name]) for name in sorted(tensors)}
    for name, tensor in written.items():
        done.writer.write(name, tensor)
    done.add(layer.layer_idx)
    return outputs, written
