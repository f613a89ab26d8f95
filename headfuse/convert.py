"""The conversion, top to bottom: checkpoint and text -> survey -> plan -> fused layers -> folder."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import headfuse
from headfuse import dha
from headfuse.architectures import Architecture, AttentionWeights
from headfuse.calibration import START_WEIGHT, CalibrationText
from headfuse.card import fused_card
from headfuse.checkpoint import (
    DTYPE_NAMES,
    STATE,
    Checkpoint,
    SafetensorsWriter,
    check_output,
    check_space,
    copy_companions,
    output_folder,
    partial_folder,
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
from headfuse.hub import default_parent
from headfuse.layouts import LAYOUTS
from headfuse.loading import keep_tokenizer_class, pick_device
from headfuse.plan import FusionPlan, HeadBudget, LayerPlan
from headfuse.planning import Progress, adopt, check_budget, make_plan, reviewed_plan, survey
from headfuse.presets import PRESETS
from headfuse.refine_model import Adam, Targets, refine_model
from headfuse.sampling import average
from headfuse.source import Source
from headfuse.streaming import AttentionCapture, CanonicalCheckpoint, HiddenStates, StreamedModel

logger = logging.getLogger(__name__)

REFINED = Path(STATE, "refined", "nll.json")
"""Says that the refinement is complete beside it, and what it reached."""
NOTHING_LOST = 1e-4
"""NLL in nats; a difference this small is rounding, and training would only add noise to it."""


@dataclass(frozen=True)
class Stage:
    """One stage of a conversion: NLL of each held-out window after it, and whether its weights were kept."""

    name: str
    held_out: tuple[float, ...]
    kept: bool = True

    @property
    def nll(self) -> float | None:
        """The mean; None where no text is held out."""
        return average(self.held_out)


@dataclass(frozen=True)
class FuseResult:
    """What a conversion wrote and what it did to the held-out calibration text."""

    output: Path
    plan: FusionPlan
    stages: tuple[Stage, ...]
    held_out_before: tuple[float, ...]
    """NLL of each held-out window with the source's weights."""
    kv_bytes_before: int
    kv_bytes_after: int

    @property
    def held_out_after(self) -> tuple[float, ...]:
        """NLL of each held-out window with the written weights."""
        return [stage.held_out for stage in self.stages if stage.kept][-1]

    @property
    def nll_before(self) -> float | None:
        """Mean NLL of the held-out windows with the source's weights."""
        return average(self.held_out_before)

    @property
    def nll_after(self) -> float | None:
        """Mean NLL of the held-out windows with the written weights."""
        return average(self.held_out_after)


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
        found = _resumed_plan(partial, source, options)
        if trained:
            training = _train(partial, source, streamed, text, config, ready, options, on_progress, trust_remote_code)
            return _write_trained(partial, output, source, streamed, training, config, options)
        ready = found or ready or make_plan(source, config, survey(source, streamed, text, config, on_progress))
        writer, done = _open_writer(source, streamed, ready, partial, options)
        _write_config(partial, source, ready, dtype)
        as_written = LAYOUTS[ready.layout].config(streamed.config.to_dict(), ready)
        guard = WrittenLayers(as_written, streamed.arch, writer, streamed.device)
        before, closed_form, last = _convert(streamed, guard, text, ready, done, on_progress)
        stages = [closed_form]
        if _refines(config, ready, before, closed_form) or (partial / REFINED).exists():
            with torch.no_grad():
                targets = Targets(text.statistics, streamed.last_hidden_state(last.hidden))
            stages = _refine(partial, streamed, guard, done, ready, text, targets, closed_form, config, on_progress)
        itemsize = next(iter(writer.dtypes.values())).itemsize
        kv_bytes = source.heads.kv_bytes_per_token(itemsize), ready.kv_bytes_per_token(itemsize)
        result = FuseResult(output, ready, tuple(stages), before, *kv_bytes)
        _write_beside_weights(partial, source, result, config, writer)
        Checkpoint(partial)  # what was written opens again: headers and index agree
    return result


@dataclass(frozen=True)
class Prepared:
    """What a conversion starts from, every part of it checked; `--dry-run` ends here."""

    source: Source
    config: FuseConfig
    plan: FusionPlan | None
    """As it was reviewed, not yet adopted."""
    budget: HeadBudget
    """The plan's, else the one of equal layers, of the same total."""
    output: Path
    text: CalibrationText
    device: torch.device
    options: dict[str, Any]
    """What an interrupted run must have in common with this one, as far as no weight is read for it."""


def prepare(
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
) -> Prepared:
    """Every check before the work, the same for a conversion and its dry run; reads headers and text, writes nothing.

    Args: as of `fuse`.

    Raises:
        HeadfuseError: for a model, plan, budget, text, device or output that cannot be used.
    """
    config = config or FuseConfig()
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConfigError(f"{dtype!r} is not written", where="--dtype", fix=f"give one of {', '.join(DTYPE_NAMES)}")
    source = Source.open(model, trust_remote_code)
    ready = None
    if plan is not None:
        ready, config = reviewed_plan(plan, source, config)
    output = output or default_output(source, config, ready)
    check_output(output, overwrite=overwrite, resume=resume, reads=[source.folder])
    budget = check_budget(config, source) if ready is None else ready.head_budget
    if FUSION_METHODS[config.method].trained:
        dha.check_family(source)
    check_space(output, _written_bytes(source, budget, dtype))
    text = source.calibration_text(config, trust_remote_code)
    options = {
        "headfuse": headfuse.__version__,
        "config": config.to_yaml(),
        "text": _digest(text),
        "dtype": dtype,
    }
    if resume:
        _check_resumed(partial_folder(output), options)
    return Prepared(source, config, ready, budget, output, text, pick_device(device), options)


def _written_bytes(source: Source, budget: HeadBudget, dtype: str | None) -> int:
    """At least so many bytes are written: those of the source without the heads that go, biases aside."""
    heads, checkpoint = source.heads, source.checkpoint
    fixed = None if dtype is None else DTYPE_NAMES[dtype].itemsize
    whole = sum(math.prod(s) * (fixed or checkpoint.dtypes[name].itemsize) for name, s in checkpoint.shapes.items())
    gone = (heads.total_heads - budget.total) * heads.head_dim * (heads.hidden_size + 1)
    return whole - gone * (fixed or max(kind.itemsize for kind in checkpoint.dtypes.values()))


def default_output(source: Source, config: FuseConfig, plan: FusionPlan | None = None) -> Path:
    """`<model>-headfuse-<budget>` beside the model; in the working directory for one of the hub."""
    label = config.budget.label if plan is None else f"{plan.kv_ratio:.4g}"
    return default_parent(source.folder) / f"{source.name.rsplit('/')[-1]}-headfuse-{label}"


def _train(
    partial: Path,
    source: Source,
    streamed: StreamedModel,
    text: CalibrationText,
    config: FuseConfig,
    plan: FusionPlan | None,
    options: dict[str, Any],
    on_progress: Progress,
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
    writer, _ = _open_writer(source, streamed, trained.plan, partial, options)
    for name in writer.shapes:
        tensor = trained.weights.get(name)
        writer.write(name, source.checkpoint.read(name) if tensor is None else tensor)
    _write_config(partial, source, trained.plan, options["dtype"])
    itemsize = next(iter(writer.dtypes.values())).itemsize
    kv_bytes = source.heads.kv_bytes_per_token(itemsize), trained.plan.kv_bytes_per_token(itemsize)
    stages = (Stage("trained", trained.held_out_after),)
    result = FuseResult(output, trained.plan, stages, trained.held_out_before, *kv_bytes)
    _write_beside_weights(partial, source, result, config, writer)
    Checkpoint(partial)
    return result


def _convert(
    streamed: StreamedModel,
    guard: WrittenLayers,
    text: CalibrationText,
    plan: FusionPlan,
    done: Done,
    on_progress: Progress,
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
    done: Done,
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


def _refines(config: FuseConfig, plan: FusionPlan, held_out: tuple[float, ...], closed_form: Stage) -> bool:
    """Whether the preset refines this model: published baselines, and what has lost nothing, stay as they are."""
    if not PRESETS[config.preset].model_passes or not FUSION_METHODS[plan.method].refits_output:
        return False
    before = average(held_out)
    if before is None or closed_form.nll is None:
        logger.warning("preset %s refines only under the guard of held-out text, and none is held out", config.preset)
        return False
    return closed_form.nll > before + NOTHING_LOST


def _refine(
    partial: Path,
    streamed: StreamedModel,
    guard: WrittenLayers,
    done: Done,
    plan: FusionPlan,
    text: CalibrationText,
    targets: Targets,
    closed_form: Stage,
    config: FuseConfig,
    on_progress: Progress,
) -> list[Stage]:
    """Refine the fused layers together; their weights are written only if the held-out loss falls.

    They are complete in the state folder before the first one is overwritten, so that an interrupted run goes on.
    """
    record, writer = partial / REFINED, done.writer
    folder, fused = record.parent, [layer.layer_idx for layer in plan.layers if not layer.untouched]
    shapes = {name: writer.shapes[name] for name in guard.attention_weights(fused)}
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    optimizer = Adam(folder, shapes)
    if not record.exists():
        for name, weight in optimizer.weights.items():
            weight.copy_(writer.read(name))

        def on_step(done: int, total: int) -> None:
            on_progress("refine", done, total)

        refine_model(streamed, guard, optimizer, targets, PRESETS[config.preset].model_passes, config.seed, on_step)
        states = streamed.embed(text.held_out)
        for layer_idx in range(streamed.num_layers):
            prefix = streamed.arch.layer_prefix(layer_idx) + "."
            weights = {n: w.to(writer.dtypes[n]) for n, w in optimizer.weights.items() if n.startswith(prefix)}
            states = guard.run(layer_idx, states, weights)
        optimizer.sync()
        refined = streamed.nll(states, text.held_out)
        write_whole(record, json.dumps({"closed form": closed_form.held_out, "refined": refined}))
    figures = {name: tuple(held_out) for name, held_out in json.loads(record.read_text(encoding="utf-8")).items()}
    kept = math.fsum(figures["refined"]) < math.fsum(figures["closed form"])  # false for NaN, too
    for name, weight in optimizer.weights.items() if kept else ():
        writer.write(name, weight)
    return [Stage(closed_form.name, figures["closed form"]), Stage("refined", figures["refined"], kept)]


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
    if read_resume(partial, "fuse") is None:
        return None
    _check_resumed(partial, options)
    plan = None if "source" in options else _plan_of(partial)  # that of a training is in its state
    if plan is not None and plan.source.fingerprint != source.checkpoint.fingerprint():
        raise _other_run(partial, ["source"])
    return plan and plan.model_copy(update={"source": source.identity()})


def _check_resumed(partial: Path, options: dict[str, Any]) -> None:
    """Raise ConfigError when the interrupted run in this folder, if there is one, had other options."""
    state = read_resume(partial, "fuse")
    before = {} if state is None else state.get("options")
    before = before if isinstance(before, dict) else {}
    changed = [name for name in options if options[name] != before.get(name)]
    if state is not None and changed:
        raise _other_run(partial, changed)


def _other_run(partial: Path, changed: list[str]) -> ConfigError:
    return ConfigError(
        f"the interrupted run here was another one: it differs in {', '.join(changed)}",
        where=partial,
        fix="give --resume the source and the options of that run, or start anew with --overwrite alone",
    )


def _plan_of(partial: Path) -> FusionPlan:
    path, fix = partial / STATE / "plan.json", "start anew with --overwrite, without --resume"
    try:
        plan = read_plan(path)
    except HeadfuseError as error:
        raise ConfigError(error.what, where=error.where, fix=fix) from None
    if plan != plan.sealed():
        raise ConfigError("is not what the interrupted run wrote", where=path, fix=fix)
    return plan.model_copy(update={"seal": None})


def _open_writer(
    source: Source, streamed: StreamedModel, plan: FusionPlan, partial: Path, options: dict[str, Any]
) -> tuple[SafetensorsWriter, Done]:
    """Lay out the output files, copy what does not change, and read which layers an earlier run finished."""
    state, checkpoint, arch = partial / STATE, streamed.checkpoint, streamed.arch
    dtype = None if options["dtype"] is None else DTYPE_NAMES[options["dtype"]]
    done = _layers_done(state / "done.json")
    in_layers = tuple(arch.layer_prefix(i) + "." for i in range(streamed.num_layers))

    def in_order_of_writing(name: str) -> tuple[int, str]:
        return next((i for i, prefix in enumerate(in_layers) if name.startswith(prefix)), -1), name

    tensors = _written_tensors(checkpoint, arch, plan)
    spec = {}
    for name in sorted(tensors, key=in_order_of_writing):
        stored, shape = tensors[name]
        spec[name] = (dtype if dtype is not None and stored.is_floating_point else stored, shape)
    writer = SafetensorsWriter(partial, spec, resume=done is not None)
    if done is None:
        state.mkdir(exist_ok=True)
        write_whole(state / "plan.json", plan.sealed().to_json())
        write_resume(partial, "fuse", {"options": options})
    for name in spec:
        if not name.startswith(in_layers):
            writer.write(name, checkpoint.read(name))
    return writer, Done(state / "done.json", writer, done or [])


def _written_tensors(
    checkpoint: Checkpoint | CanonicalCheckpoint, arch: Architecture, plan: FusionPlan
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of the fused model, at the source's precision."""
    layout, heads = LAYOUTS[plan.layout], plan.heads
    spec = {n: (checkpoint.dtypes[n], shape) for n, shape in checkpoint.shapes.items()}
    for layer in plan.layers:
        prefix = arch.layer_prefix(layer.layer_idx) + "."
        own = [name for name in spec if name.startswith(prefix)]
        tensors = {n.removeprefix(prefix): torch.empty(spec[n][1], dtype=spec[n][0], device="meta") for n in own}
        weights = AttentionWeights.of_layer(tensors, arch, heads)
        weights = weights.resized(len(layer.key_groups), len(layer.value_groups))
        written = weights.in_layer(tensors, arch, heads, layout.stored(arch))
        for name in own:
            if name.removeprefix(prefix) not in written:
                del spec[name]
        spec.update({prefix + name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()})
    return spec


def _layers_done(path: Path) -> list[int] | None:
    """What an interrupted run finished; None, and everything is done again, where nothing says so."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return layers if isinstance(layers, list) else None


def _write_config(partial: Path, source: Source, plan: FusionPlan, dtype: str | None) -> None:
    raw = source.raw_config()
    if dtype is not None:
        raw.pop("torch_dtype", None)
        raw["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(LAYOUTS[plan.layout].config(raw, plan), indent=2) + "\n")


def _write_beside_weights(
    partial: Path, source: Source, result: FuseResult, config: FuseConfig, writer: SafetensorsWriter
) -> None:
    """Everything but weights and config: tokenizer and licence, headfuse.yaml, card, plan.json with checksums."""
    plan = result.plan
    copy_companions(source.folder, partial, source.trust_remote_code)
    if plan.layout != "gqa":
        keep_tokenizer_class(source.folder, partial)
    head = f"# headfuse fuse --config headfuse.yaml {plan.source.model}\n"
    (partial / "headfuse.yaml").write_text(head + config.to_yaml(), encoding="utf-8")
    (partial / "README.md").write_text(fused_card(source, result), encoding="utf-8")
    write_plan(partial, plan, writer.checksums())
