"""The conversion, top to bottom: checkpoint and text -> survey -> plan -> fused layers -> folder."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headfuse.checkpoint.background import InTurn
from headfuse.checkpoint.interrupted import read_resume, write_resume
from headfuse.checkpoint.output import output_folder
from headfuse.checkpoint.reader import DTYPE_NAMES, Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.config.fuse import FuseConfig
from headfuse.conversion.conversion import Conversion, FusedModel
from headfuse.conversion.long_runs import advice
from headfuse.conversion.output import open_writer, write_beside_weights
from headfuse.conversion.preflight import prepare
from headfuse.conversion.refine import REFINED, Refinement, Targets, refine, refines
from headfuse.conversion.result import FuseResult, Stage
from headfuse.conversion.resume import FinishedLayers, resumed_plan
from headfuse.dha import pipeline as dha
from headfuse.fusion import FUSION_METHODS
from headfuse.fusion.layer import fuse_layer
from headfuse.fusion.reading_layer import Kept, fuse_latent_layer, latent_cache
from headfuse.fusion.wide_layer import fuse_wide_layer
from headfuse.layouts import LAYOUTS
from headfuse.layouts.served import channels_in_runtimes
from headfuse.models.decoder_layers import DecoderLayers, HiddenStates
from headfuse.models.families import Architecture
from headfuse.models.placement import factories_on
from headfuse.models.source_layer import SourceLayer
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan
from headfuse.planning.planner import PlanOptions, ProgressCallback, plan_model, plan_options, survey
from headfuse.planning.review import adopt
from headfuse.text.calibration import START_WEIGHT

logger = logging.getLogger(__name__)


def fuse(
    model: str | Path,
    config: FuseConfig | str | Path | None = None,
    *,
    output: str | Path | None = None,
    plan: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: ProgressCallback = lambda phase, done, total: None,
    **options: Any,
) -> FuseResult:
    """Fuse the key heads and value heads of a model and write the result as a checkpoint folder.

    Args:
        model: folder or hub id of a model of a supported family (docs/reference/families.md).
        config: a `FuseConfig`, a YAML file or the name of a packaged config; by default a quarter of the cache is kept.
        output: default `<model>-headfuse-<budget>` beside the model; in the working directory for one of the hub.
        plan: a reviewed plan.json that replaces budget and grouping.
        overwrite: replace an existing output.
        resume: go on with an interrupted conversion.
        on_progress: called with phase, done and total layers.
        **options: those of `headfuse fuse` by name, which win over `config`: `budget`, `method`, `allocator`,
            `grouping`, `layout`, `preset`, `data`, `samples`, `sequence_length`, `seed`; `device`, `placement`,
            `compute_dtype`, `dtype` (of the written weights; by default the source's), `threads`, `trust_remote_code`;
            and the sections `budget`, `calibration` and `dha` of YAML, as mappings.

    Raises:
        HeadfuseError: for every kind of bad input; nothing appears under the output name.
    """
    prepared = prepare(model, config, output=output, plan=plan, overwrite=overwrite, resume=resume, **options)
    source, config, output, text = prepared.source, prepared.config, prepared.output, prepared.text
    machine = prepared.machine
    if (long := advice(source, config, machine.compute_dtype, prepared.device, prepared.speed)) is not None:
        logger.warning("The conversion takes %s.", long)
    reviewed = prepared.plan and adopt(prepared.plan, source)
    common = {**prepared.options, "plan": None if reviewed is None else reviewed.to_json()}
    trained = FUSION_METHODS[config.method].trained
    if trained:
        common["source"] = source.identity().fingerprint
    streamed = StreamedModel(
        source.checkpoint, source.config, prepared.device, machine.placement, DTYPE_NAMES[machine.compute_dtype]
    )
    with output_folder(output, overwrite=overwrite, resume=resume, reads=[source.folder]) as partial:
        conversion = Conversion(source, streamed, text, partial, on_progress)
        found = resumed_plan(partial, source, common)
        if trained:
            written = _train(conversion, config, reviewed, common, prepared.machine.trust_remote_code)
        else:
            planned = found or reviewed or _plan(conversion, plan_options(config))
            written = _write(conversion, planned, common, Refinement(config.preset, config.seed))
        return _finish(conversion, written, config, output, prepared.machine.dtype, reviewed is not None)


@dataclass(frozen=True)
class _Written:
    """The weights that are in the folder, and the source's NLL on each held-out window."""

    plan: FusionPlan
    writer: SafetensorsWriter
    stages: tuple[Stage, ...]
    held_out_before: tuple[float, ...]


def _finish(
    conversion: Conversion, written: _Written, config: FuseConfig, output: Path, dtype: str | None, reviewed: bool
) -> FuseResult:
    """Write the files beside the weights; return the result, under the folder's final name. `reviewed`: by `--plan`."""
    itemsize = next(iter(written.writer.dtypes.values())).itemsize
    before, after = (shape.kv_bytes_per_token(itemsize) for shape in (conversion.source.heads, written.plan))
    served = channels_in_runtimes(written.plan, conversion.source.config)
    kv_bytes_in = {runtime: (itemsize * source, itemsize * fused) for runtime, (source, fused) in served.items()}
    result = FuseResult(output, written.plan, written.stages, written.held_out_before, before, after, kv_bytes_in)
    checksums = written.writer.checksums()
    write_beside_weights(conversion.folder, conversion.source, result, config, dtype, checksums, reviewed)
    Checkpoint(conversion.folder)  # what was written opens again: headers and index agree
    return result


def _plan(conversion: Conversion, options: PlanOptions) -> FusionPlan:
    """Survey the source and plan every layer."""
    streamed, text, on_progress = conversion.streamed, conversion.text, conversion.on_progress
    found = survey(streamed, text, options, on_progress)
    return plan_model(conversion.source, streamed, text, options, found, on_progress)


def _train(
    conversion: Conversion,
    config: FuseConfig,
    plan: FusionPlan | None,
    options: dict[str, Any],
    trust_remote_code: bool,
) -> _Written:
    """Run the trained stages of method dha, resumable from their first step; other methods return the source."""
    source, streamed, text, partial = conversion.source, conversion.streamed, conversion.text, conversion.folder
    if read_resume(partial, "fuse") is None:
        write_resume(partial, "fuse", {"options": options})
    trained = dha.train(source, streamed, config, text, partial, plan, conversion.on_progress, trust_remote_code)
    writer, _ = open_writer(source, streamed, trained.plan, partial, options)
    for name in writer.shapes:
        tensor = trained.weights.get(name)
        writer.write(name, source.checkpoint.read(name) if tensor is None else tensor)
    return _Written(trained.plan, writer, (Stage("trained", trained.held_out_after),), trained.held_out_before)


def _write(conversion: Conversion, plan: FusionPlan, options: dict[str, Any], refinement: Refinement) -> _Written:
    """Fuse layer after layer, then refine all of them together if the preset does so."""
    source, streamed, partial = conversion.source, conversion.streamed, conversion.folder
    writer, done = open_writer(source, streamed, plan, partial, options)
    as_written = LAYOUTS[plan.layout].config(streamed.config.to_dict(), plan)
    layers = DecoderLayers.of_config(as_written, streamed.arch, writer, streamed.layers)
    fused = FusedModel(plan, layers if plan.head_width is None else layers.with_own_positions())
    before, closed_form, last = _convert(conversion, fused, done)
    stages = [closed_form]
    if refines(refinement, plan, before, closed_form) or (partial / REFINED).exists():
        streamed.layers.kept = None  # of the source: the fused layers take the place
        with torch.no_grad():
            windows = conversion.text.statistics
            targets = Targets(windows, streamed.last_hidden_state(last.hidden[: len(windows)]))
        stages = refine(conversion, fused, writer, targets, closed_form, refinement)
    return _Written(plan, writer, tuple(stages), before)


def _convert(
    conversion: Conversion, fused: FusedModel, done: FinishedLayers
) -> tuple[tuple[float, ...], Stage, HiddenStates]:
    """Fuse layer after layer.

    Returns the source's NLL on each held-out window, the stage, and what the source made of the fitted windows.
    """
    streamed, text, layers = conversion.streamed, conversion.text.fitted, fused.plan.layers
    statistics = streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)
    before = after = streamed.embed(text.held_out)
    windows, kept = statistics[0], Kept()
    with InTurn(thread=streamed.device.type != "cpu") as write:
        for layer in streamed.walk(statistics, [before]):
            windows, _, before = layer.outputs
            written = on_host = {}
            if layer.index in done.layers:
                if layer.index in fused.plan.sources:  # what it caches is read by layers that may not be done
                    with factories_on(streamed.device):
                        output, captures = layer.weights.output, layer.captures
                        kept[layer.index] = latent_cache(output, captures, fused.plan, layer.index, kept)
            else:
                written = _fused(streamed.arch, layer, fused.plan, done.writer.dtypes, kept)
                on_host = {name: tensor.cpu() for name, tensor in written.items()}
                write(functools.partial(done.write, layer.index, on_host))
            fused.layers.keep(written)
            if len(after):
                after = fused.layers.run(layer.index, after, written)
            del written, on_host  # not beside the next layer
            conversion.on_progress("fuse", layer.index + 1, len(layers))
    stage = Stage("closed form", streamed.nll(after, text.held_out))
    return streamed.nll(before, text.held_out), stage, windows


def _fused(
    arch: Architecture,
    source: SourceLayer,
    plan: FusionPlan,
    dtypes: Mapping[str, torch.dtype],
    kept: Kept,
) -> dict[str, torch.Tensor]:
    """The tensors of one fused layer, by full name; `kept`: what layers cache of the windows, while others read it."""
    layout, layer, weights = LAYOUTS[plan.layout], plan.layers[source.index], source.weights
    prefix = arch.layer_prefix(source.index) + "."
    with factories_on(weights.query.device):
        if layout.wide:
            weights = fuse_latent_layer(weights, source.captures, plan, source.index, kept)
        elif layer.wide:
            weights, _ = fuse_wide_layer(weights, source.captures, layer, plan.heads)
        elif not layer.untouched:
            weights = fuse_layer(weights, source.captures, layer, plan.heads, FUSION_METHODS[plan.method])
        tensors = layout.arrange(weights, layer, plan).in_layer(
            source.tensors, arch, plan.written_heads, layout.stored(arch)
        )
    return {prefix + name: tensors[name].to(dtypes[prefix + name]) for name in sorted(tensors)}
