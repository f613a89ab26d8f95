"""The conversion, top to bottom: checkpoint and text -> survey -> plan -> fused layers -> folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import headfuse
from headfuse.architectures import AttentionWeights
from headfuse.calibration import START_WEIGHT, CalibrationText
from headfuse.card import fused_card
from headfuse.checkpoint import (
    DTYPE_NAMES,
    STATE,
    SafetensorsWriter,
    check_output,
    copy_companions,
    output_folder,
    read_plan,
    read_resume,
    write_plan,
    write_resume,
    write_whole,
)
from headfuse.config import FuseConfig
from headfuse.errors import ConfigError, HeadfuseError
from headfuse.fuse_layer import fuse_layer
from headfuse.fusion import FUSION_METHODS
from headfuse.guard import WrittenLayers
from headfuse.layouts import LAYOUTS
from headfuse.loading import pick_device
from headfuse.plan import FusionPlan
from headfuse.planning import Progress, adopt, check_budget, make_plan, reviewed_plan, survey
from headfuse.source import Source
from headfuse.streaming import AttentionCapture, StreamedModel, ignorable


@dataclass(frozen=True)
class FuseResult:
    """What a conversion wrote and what it did to the held-out calibration text."""

    output: Path
    plan: FusionPlan
    nll_before: float | None
    nll_after: float | None
    kv_bytes_before: int
    kv_bytes_after: int


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
    on_progress: Progress = lambda phase, done, total: None,
) -> FuseResult:
    """Fuse the key heads and value heads of a model and write the result as a checkpoint folder.

    Args:
        model: folder or hub id of a llama, mistral or qwen2 checkpoint.
        config: every option; the defaults keep a quarter of the KV cache.
        output: default `<model>-headfuse-<budget>` beside the model.
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
    config = config or FuseConfig()
    source = Source.open(model, trust_remote_code)
    ready = None
    if plan is not None:
        ready, config = reviewed_plan(plan, source, config)
    output = output or default_output(model, source, config, ready)
    place: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "reads": [source.folder]}
    check_output(output, **place)
    ready = ready and adopt(ready, source)
    if ready is None:
        check_budget(config, source.heads)
    text = source.calibration_text(config, trust_remote_code)
    options = {
        "headfuse": headfuse.__version__,
        "config": config.to_yaml(),
        "text": _digest(text),
        "dtype": dtype,
        "plan": None if ready is None else ready.to_json(),
    }
    streamed = StreamedModel(source.checkpoint, source.config, pick_device(device))
    with output_folder(output, **place) as partial:
        ready = _resumed_plan(partial, source, options) or ready
        ready = ready or make_plan(source, config, survey(source, streamed, text, config, on_progress))
        writer, done = _open_writer(source, streamed, ready, partial, options)
        nll = _convert(streamed, text, ready, writer, done, on_progress)
        itemsize = next(iter(writer.dtypes.values())).itemsize
        kv_bytes = source.heads.kv_bytes_per_token(itemsize), ready.kv_bytes_per_token(itemsize)
        result = FuseResult(output, ready, *nll, *kv_bytes)
        _write_beside_weights(partial, source, result, config, dtype)
    return result


def default_output(model: str, source: Source, config: FuseConfig, plan: FusionPlan | None = None) -> Path:
    """`<model>-headfuse-<budget>` beside the model; in the working directory for a hub id."""
    label = config.budget.label if plan is None else f"{plan.kv_ratio:.4g}"
    parent = Path(model).resolve().parent if Path(model).exists() else Path.cwd()
    return parent / f"{source.name.rsplit('/')[-1]}-headfuse-{label}"


def _convert(
    streamed: StreamedModel,
    text: CalibrationText,
    plan: FusionPlan,
    writer: SafetensorsWriter,
    done: Done,
    on_progress: Progress,
) -> tuple[float | None, float | None]:
    """Fuse layer after layer; NLL of the held-out windows before and after."""
    arch, method, layout = streamed.arch, FUSION_METHODS[plan.method], LAYOUTS[plan.layout]
    windows, starts = streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)
    before = after = streamed.embed(text.held_out)
    guard = WrittenLayers(layout.config(streamed.model.config.to_dict(), plan), arch, streamed.device)
    for layer in plan.layers:
        prefix = arch.layer_prefix(layer.layer_idx) + "."
        tensors, captures = streamed.layer_tensors(layer.layer_idx), list[AttentionCapture]()
        weights = AttentionWeights.of_layer(tensors, arch, plan.heads.head_dim)
        with streamed.layer(layer.layer_idx, tensors) as run:
            windows, starts, before = run(windows, captures), run(starts, captures), run(before, None)
        if layer.layer_idx not in done.layers:
            if not layer.untouched:
                weights = fuse_layer(weights, captures, layer, plan.heads, method)
            for name, tensor in layout.arrange(weights, layer, plan).in_layer(tensors, arch).items():
                writer.write(prefix + name, tensor)
            done.add(layer.layer_idx)
        if len(after):
            after = guard.run(layer.layer_idx, {name: writer.read(prefix + name) for name in tensors}, after)
        on_progress("fuse", layer.layer_idx + 1, len(plan.layers))
    if not len(after):
        return None, None
    return streamed.nll(before, text.held_out), streamed.nll(after, text.held_out)


@dataclass
class Done:
    """The layers that are written, on disk for `--resume`."""

    path: Path
    writer: SafetensorsWriter
    layers: list[int]

    def add(self, layer_idx: int) -> None:
        """Record one more layer, once its weights are on the disk."""
        self.writer.sync()
        self.layers.append(layer_idx)
        write_whole(self.path, json.dumps(self.layers))


def _digest(text: CalibrationText) -> str:
    """Hash of the tokens: a file of the same name may hold another text when a run goes on."""
    tokens = torch.cat([text.statistics, text.held_out])
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _resumed_plan(partial: Path, source: Source, options: dict[str, Any]) -> FusionPlan | None:
    """The plan of the interrupted run in this folder, if there is one.

    Raises:
        ConfigError: when that run had another source or other options.
    """
    state = read_resume(partial, "fuse")
    if state is None:
        return None
    before = state.get("options", {})
    changed = [name for name in options if options[name] != before.get(name)]
    plan = None if changed else _plan_of(partial)
    if plan is not None and plan.source != source.identity():
        changed = ["source"]
    if changed:
        raise ConfigError(
            f"the interrupted run here was another one: it differs in {', '.join(changed)}",
            where=partial,
            fix="give --resume the source and the options of that run, or start anew with --overwrite alone",
        )
    return plan


def _plan_of(partial: Path) -> FusionPlan:
    try:
        return read_plan(partial / STATE / "plan.json")
    except HeadfuseError as error:
        fix = "start anew with --overwrite, without --resume"
        raise ConfigError(error.what, where=error.where, fix=fix) from None


def _open_writer(
    source: Source, streamed: StreamedModel, plan: FusionPlan, partial: Path, options: dict[str, Any]
) -> tuple[SafetensorsWriter, Done]:
    """Lay out the output files, copy what does not change, and read which layers an earlier run finished."""
    state, checkpoint, arch, d = partial / STATE, source.checkpoint, streamed.arch, source.heads.head_dim
    dtype = None if options["dtype"] is None else DTYPE_NAMES[options["dtype"]]
    done = _layers_done(state / "done.json")
    counts: dict[str, int] = {}
    for layer in plan.layers:
        prefix = arch.attention_prefix(layer.layer_idx)
        for kind in ("weight", "bias"):
            counts[f"{prefix}.{arch.key}.{kind}"] = len(layer.key_groups)
            counts[f"{prefix}.{arch.value}.{kind}"] = len(layer.value_groups)
    spec = {}
    for name, shape in checkpoint.shapes.items():
        if ignorable(name):
            continue
        kept = (counts[name] * d, *shape[1:]) if name in counts else shape
        stored = checkpoint.dtypes[name]
        spec[name] = (dtype if dtype is not None and stored.is_floating_point else stored, kept)
    writer = SafetensorsWriter(partial, spec, resume=done is not None)
    if done is None:
        state.mkdir(exist_ok=True)
        write_whole(state / "plan.json", plan.to_json())
        write_resume(partial, "fuse", {"options": options})
    in_layers = tuple(arch.layer_prefix(i) + "." for i in range(streamed.num_layers))
    for name in spec:
        if not name.startswith(in_layers):
            writer.write(name, checkpoint.read(name))
    return writer, Done(state / "done.json", writer, done or [])


def _layers_done(path: Path) -> list[int] | None:
    """What an interrupted run finished; None, and everything is done again, where nothing says so."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return layers if isinstance(layers, list) else None


def _write_beside_weights(
    partial: Path, source: Source, result: FuseResult, config: FuseConfig, dtype: str | None
) -> None:
    """Everything but the weights: config, tokenizer and licence, headfuse.yaml, card, plan.json with checksums."""
    raw, plan = source.raw_config(), result.plan
    if dtype is not None:
        raw.pop("torch_dtype", None)
        raw["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(LAYOUTS[plan.layout].config(raw, plan), indent=2) + "\n")
    copy_companions(source.folder, partial)
    head = f"# headfuse fuse --config headfuse.yaml {plan.source.name}\n"
    (partial / "headfuse.yaml").write_text(head + config.to_yaml(), encoding="utf-8")
    (partial / "README.md").write_text(fused_card(source, result), encoding="utf-8")
    write_plan(partial, plan)
