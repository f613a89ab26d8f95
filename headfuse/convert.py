"""The layer-streamed conversion, top to bottom: checkpoint and text -> survey -> plan -> fused layers -> folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import headfuse
from headfuse.architectures import AttentionWeights, head_layout
from headfuse.calibration import LayerSurvey, key_moments, survey_layer, value_moments
from headfuse.checkpoint import (
    DTYPE_NAMES,
    RESUME,
    STATE,
    Checkpoint,
    SafetensorsWriter,
    check_output,
    copy_companions,
    fingerprint,
    output_folder,
    read_config,
    read_plan,
    resolve_model,
    write_plan,
)
from headfuse.config import FuseConfig
from headfuse.errors import CheckpointError, ConfigError
from headfuse.fusion import FUSION_METHODS, FusionMethod
from headfuse.fusion.maps import HeadMaps
from headfuse.layouts import LAYOUTS
from headfuse.loading import load_tokenizer, pick_device
from headfuse.plan import FusionPlan, Groups, HeadBudget, HeadLayout, LayerPlan, SourceModel, head_of_source
from headfuse.streaming import AttentionCapture, StreamedModel, ignorable
from headfuse.text import read_documents, token_windows

Progress = Callable[[str, int, int], None]
REFIT_RIDGE = 1e-4


@dataclass(frozen=True)
class FuseResult:
    """What a conversion wrote and what it did to the held-out calibration text."""

    output: Path
    plan: FusionPlan
    nll_before: float | None
    nll_after: float | None
    kv_bytes_before: int
    kv_bytes_after: int


@dataclass(frozen=True)
class Source:
    """An opened source model."""

    name: str
    folder: Path
    checkpoint: Checkpoint
    config: Any
    heads: HeadLayout

    @classmethod
    def open(cls, model: str, trust_remote_code: bool = False) -> Source:
        """Open and check a source model: config, family, weight files."""
        folder = resolve_model(model)
        config = read_config(folder, trust_remote_code)
        heads = head_layout(config, folder / "config.json")
        name = model if not Path(model).exists() else folder.resolve().name
        return cls(name, folder, Checkpoint(folder), config, heads)


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
    output = output or default_output(model, source, config)
    check_output(output, overwrite=overwrite, resume=resume)
    check_budget(config, source.heads)
    written = None if dtype is None else DTYPE_NAMES[dtype]
    ready = None if plan is None else _checked_plan(plan, source)
    windows = calibration_windows(source, config, trust_remote_code)
    streamed = StreamedModel(source.checkpoint, source.config, pick_device(device))
    with output_folder(output, overwrite=overwrite, resume=resume) as partial:
        state = partial / STATE
        if resume and (state / "plan.json").exists():
            ready = read_plan(state / "plan.json")
        if ready is None:
            surveys = survey(source, streamed, windows, config, needs_costs(config), on_progress)
            ready = make_plan(source, config, surveys)
        nll = _convert(source, streamed, windows, ready, config, partial, written, on_progress)
        layout = LAYOUTS[ready.layout]
        raw = json.loads((source.folder / "config.json").read_text())
        raw.pop("_name_or_path", None)
        if dtype is not None:
            raw.pop("torch_dtype", None)
            raw["dtype"] = dtype
        (partial / "config.json").write_text(json.dumps(layout.config(raw, ready), indent=2) + "\n")
        copy_companions(source.folder, partial)
        (partial / "headfuse.yaml").write_text(config.to_yaml())
        itemsize = (written or source.checkpoint.dtypes[next(iter(source.checkpoint.dtypes))]).itemsize
        result = FuseResult(
            output, ready, *nll, source.heads.kv_bytes_per_token(itemsize), ready.kv_bytes_per_token(itemsize)
        )
        from headfuse.card import fused_card

        (partial / "README.md").write_text(fused_card(source, result, config))
        write_plan(partial, ready)
    return result


def default_output(model: str, source: Source, config: FuseConfig) -> Path:
    """`<model>-headfuse-<budget>` beside the model; in the working directory for a hub id."""
    parent = Path(model).resolve().parent if Path(model).exists() else Path.cwd()
    return parent / f"{source.name.rsplit('/')[-1]}-headfuse-{config.budget.label}"


def calibration_windows(source: Source, config: FuseConfig, trust_remote_code: bool = False) -> torch.Tensor:
    """The calibration text as token windows `[samples, sequence_length]`."""
    calibration = config.calibration
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    limit = getattr(source.config, "max_position_embeddings", None)
    if limit and calibration.sequence_length > limit:
        raise ConfigError(
            f"{calibration.sequence_length} is longer than the model's {limit} positions", where="--sequence-length"
        )
    documents = read_documents(calibration.data, seed=config.seed)
    windows = token_windows(
        documents, tokenizer, calibration.sequence_length, calibration.samples, required=2, where=calibration.data
    )
    if windows.max() >= source.config.vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model", where=source.folder, fix="use the model's own tokenizer"
        )
    return windows


def split(windows: torch.Tensor, config: FuseConfig) -> int:
    """Number of leading windows that statistics may see; the rest is held out."""
    return max(1, len(windows) - round(len(windows) * config.calibration.held_out))


def survey(
    source: Source,
    streamed: StreamedModel,
    windows: torch.Tensor,
    config: FuseConfig,
    costs: bool,
    on_progress: Progress = lambda phase, done, total: None,
) -> list[LayerSurvey]:
    """Run the source once over a quarter of the windows and measure every layer's heads."""
    used = windows[: max(1, split(windows, config) // 3)]
    hidden = streamed.embed(used)
    surveys = []
    for layer_idx in range(streamed.num_layers):
        tensors, captures = streamed.layer_tensors(layer_idx), list[AttentionCapture]()
        inputs, hidden = hidden, streamed.run_layer(layer_idx, tensors, hidden, captures)
        weights = attention_weights(tensors, streamed, source.heads)
        method = FUSION_METHODS[config.method]
        surveys.append(survey_layer(captures, weights.output, inputs, source.heads, method, config.grouping, costs))
        on_progress("survey", layer_idx + 1, streamed.num_layers)
    return surveys


def needs_costs(config: FuseConfig) -> bool:
    """Whether the allocator reads the measured cost table."""
    return config.budget.allocator == "sensitivity" and config.layout != "gqa" and config.budget.rules.total is not None


def check_budget(config: FuseConfig, heads: HeadLayout) -> HeadBudget:
    """A plan-free allocation, which refuses what cannot work before any heavy step.

    Raises:
        BudgetError: saying which budget works.
    """
    rules = config.budget.rules
    return rules.allocate_gqa(heads) if config.layout == "gqa" else rules.allocate("uniform", heads)


def make_plan(source: Source, config: FuseConfig, surveys: list[LayerSurvey]) -> FusionPlan:
    """Budget and groups -> the plan of every layer."""
    heads, rules = source.heads, config.budget.rules
    if config.layout == "gqa":
        budget = rules.allocate_gqa(heads)
        layers = [
            LayerPlan(layer_idx=i, key_groups=groups, value_groups=groups)
            for i, groups in enumerate(s.shared_groups[budget.key_heads[i]] for i, s in enumerate(surveys))
        ]
    else:
        table = [s.key_cost for s in surveys] + [s.value_cost for s in surveys]
        budget = rules.allocate(config.budget.allocator, heads, table)
        layers = [
            LayerPlan(
                layer_idx=i,
                key_groups=s.key_groups[budget.key_heads[i] - 1],
                value_groups=s.value_groups[budget.value_heads[i] - 1],
            )
            for i, s in enumerate(surveys)
        ]
    return FusionPlan(
        headfuse_version=headfuse.__version__,
        source=SourceModel(name=source.name, fingerprint=fingerprint(source.folder)),
        heads=heads,
        layout=config.layout,
        method=config.method,
        allocator=config.budget.allocator,
        budget=config.budget.label,
        layers=tuple(layers),
    )


def _checked_plan(path: Path, source: Source) -> FusionPlan:
    plan = read_plan(path)
    if plan.heads != source.heads:
        raise ConfigError(
            "the plan is for a model of another shape", where=path, fix="make one with `headfuse analyze`"
        )
    if plan.method not in FUSION_METHODS:
        raise ConfigError(f"unknown method {plan.method!r}", where=path, fix=f"choose from {', '.join(FUSION_METHODS)}")
    return plan


def _convert(
    source: Source,
    streamed: StreamedModel,
    windows: torch.Tensor,
    plan: FusionPlan,
    config: FuseConfig,
    partial: Path,
    dtype: torch.dtype | None,
    on_progress: Progress,
) -> tuple[float | None, float | None]:
    """Fuse layer after layer into `partial`; NLL of the held-out windows before and after."""
    writer, done = _open_writer(source, streamed, plan, partial, dtype)
    used = split(windows, config)
    hidden = streamed.embed(windows)
    guard = hidden[used:]  # the held-out windows as the fused model sees them
    method = FUSION_METHODS[plan.method]
    for layer in plan.layers:
        prefix = streamed.arch.attention_prefix(layer.layer_idx) + "."
        tensors, captures = streamed.layer_tensors(layer.layer_idx), list[AttentionCapture]()
        finished = layer.layer_idx in done
        hidden = streamed.run_layer(layer.layer_idx, tensors, hidden, None if finished else captures)
        weights = attention_weights(tensors, streamed, source.heads)
        if not layer.untouched and not finished:
            fused = fuse_layer(weights, captures[:used], layer, source.heads, method)
        else:
            fused = weights
        fused = LAYOUTS[plan.layout].arrange(fused, layer, plan)
        if not finished:
            stored = fused.to_tensors(streamed.arch)
            for name, tensor in tensors.items():
                relative = name.removeprefix(streamed.arch.attention + ".")
                value = (
                    stored[relative]
                    if name.startswith(streamed.arch.attention + ".") and relative in stored
                    else tensor
                )
                writer.write(f"{streamed.arch.layer_prefix(layer.layer_idx)}.{name}", value)
            done.append(layer.layer_idx)
            (partial / STATE / "done.json").write_text(json.dumps(done))
        if len(guard):
            written = {name: writer.read(f"{streamed.arch.layer_prefix(layer.layer_idx)}.{name}") for name in tensors}
            guard = streamed.run_layer(layer.layer_idx, _expand(written, layer, plan, streamed, prefix), guard)
        on_progress("fuse", layer.layer_idx + 1, len(plan.layers))
    if not len(guard):
        return None, None
    return streamed.nll(hidden[used:], windows[used:]), streamed.nll(guard, windows[used:])


def attention_weights(tensors: dict[str, torch.Tensor], streamed: StreamedModel, heads: HeadLayout) -> AttentionWeights:
    """The attention projections among a layer's tensors."""
    prefix = streamed.arch.attention + "."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return AttentionWeights.from_tensors(own, streamed.arch, heads.head_dim)


def fuse_layer(
    weights: AttentionWeights,
    captures: list[AttentionCapture],
    layer: LayerPlan,
    heads: HeadLayout,
    method: FusionMethod,
) -> AttentionWeights:
    """Fuse one layer: keys first, then values under the fused keys' attention, then the joint refit of the output."""
    key_maps = method.key_maps(layer.key_groups, key_moments(captures, heads))
    fused_keys = (key_maps, layer.key_groups)
    value_maps = method.value_maps(layer.value_groups, value_moments(captures, weights.output, heads, fused_keys))
    fused = fold(weights, key_maps, value_maps, layer, heads)
    if method.refits_output:
        fused.output = refit_output(weights.output, fused.output, captures, fused_keys, value_maps, layer, heads)
    return fused


def fold(
    weights: AttentionWeights, key_maps: HeadMaps, value_maps: HeadMaps, layer: LayerPlan, heads: HeadLayout
) -> AttentionWeights:
    """Fold write maps into k and v and read maps into q and o (math.md 1); untouched heads are copied bit for bit."""
    query, output = weights.query.double(), weights.output.double()
    query_bias = None if weights.query_bias is None else weights.query_bias.double()
    alone = {g[0] for g in layer.key_groups if len(g) == 1}, {g[0] for g in layer.value_groups if len(g) == 1}
    for h in range(heads.num_attention_heads):
        j = heads.source_head(h)
        if j not in alone[0]:
            query[h] = key_maps.read[j].T @ query[h]
            if query_bias is not None:
                query_bias[h] = key_maps.read[j].T @ query_bias[h]
        if j not in alone[1]:
            output[:, h] = output[:, h] @ value_maps.read[j]
    return AttentionWeights(
        query,
        _write(weights.key, key_maps, layer.key_groups),
        _write(weights.value, value_maps, layer.value_groups),
        output,
        query_bias,
        None if weights.key_bias is None else _write(weights.key_bias[..., None], key_maps, layer.key_groups)[..., 0],
        None
        if weights.value_bias is None
        else _write(weights.value_bias[..., None], value_maps, layer.value_groups)[..., 0],
        weights.output_bias,
    )


def _write(source: torch.Tensor, maps: HeadMaps, groups: Groups) -> torch.Tensor:
    source = source.double()
    fused = [
        source[group[0]]
        if len(group) == 1
        else torch.einsum("jab,jbD->aD", maps.write[list(group)], source[list(group)])
        for group in groups
    ]
    return torch.stack(fused)


def refit_output(
    source: torch.Tensor,
    folded: torch.Tensor,
    captures: list[AttentionCapture],
    fused_keys: tuple[HeadMaps, Groups],
    value_maps: HeadMaps,
    layer: LayerPlan,
    heads: HeadLayout,
) -> torch.Tensor:
    """Least squares of the layer's attention output on the fused heads' outputs, shrunk towards `folded` (math.md 2).

    Args:
        source: output projection of the source `[D, n_q, d]`.
        folded: closed-form solution `[D, n_q, d]`, float64.
        captures: the layer on the calibration windows.
        fused_keys: maps and groups of the keys.
        value_maps: maps of the values.
        layer: the plan of the layer.
        heads: the source's heads.
    """
    size = heads.num_attention_heads * heads.head_dim
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, size, dtype=torch.float64)
    owner = head_of_source(layer.value_groups)
    for capture in captures:
        values = torch.stack(
            [
                torch.einsum(
                    "jab,jntb->nta",
                    value_maps.write[list(g)].to(capture.value),
                    capture.value[:, list(g)].transpose(0, 1),
                )
                for g in layer.value_groups
            ],
            dim=1,
        )[:, owner].repeat_interleave(heads.queries_per_head, dim=1)  # [B, n_q, T, d]
        z = (
            (capture.probabilities(fused_keys[0].reconstruct(capture.key, fused_keys[1])) @ values)
            .transpose(1, 2)
            .flatten(2)
            .flatten(0, 1)
        )
        target = capture.output.flatten(2).flatten(0, 1)
        gram += (z.T @ z).double().cpu()
        cross += (target.T @ z).double().cpu()
    start, wanted = folded.flatten(1), source.double().flatten(1)
    residual = wanted @ cross - start @ gram
    ridge = REFIT_RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(ridge.clamp_min(1e-300))
    return (start + torch.linalg.solve(gram, residual.T).T).view_as(folded)


def _expand(
    tensors: dict[str, torch.Tensor], layer: LayerPlan, plan: FusionPlan, streamed: StreamedModel, prefix: str
) -> dict[str, torch.Tensor]:
    """A fused layer in the source's shape: fused heads repeated, query heads in the source's order."""
    heads = plan.heads
    weights = attention_weights(tensors, streamed, heads)
    if plan.layout == "gqa":
        from headfuse.plan import query_order

        back = torch.tensor(query_order(layer.key_groups, heads)).argsort()
        weights.query, weights.output = weights.query[back], weights.output[:, back]
        if weights.query_bias is not None:
            weights.query_bias = weights.query_bias[back]
    keys, values = head_of_source(layer.key_groups), head_of_source(layer.value_groups)
    weights.key, weights.value = weights.key[keys], weights.value[values]
    weights.key_bias = None if weights.key_bias is None else weights.key_bias[keys]
    weights.value_bias = None if weights.value_bias is None else weights.value_bias[values]
    own = {f"{streamed.arch.attention}.{name}": tensor for name, tensor in weights.to_tensors(streamed.arch).items()}
    return {**tensors, **own}


def _open_writer(
    source: Source, streamed: StreamedModel, plan: FusionPlan, partial: Path, dtype: torch.dtype | None
) -> tuple[SafetensorsWriter, list[int]]:
    """Lay out the output files, copy what does not change, and read which layers an earlier run finished."""
    state, checkpoint, d = partial / STATE, source.checkpoint, source.heads.head_dim
    resumed = (partial / RESUME).exists() and (state / "done.json").exists()
    done = json.loads((state / "done.json").read_text()) if resumed else []
    counts: dict[str, int] = {}
    for layer in plan.layers:
        prefix = streamed.arch.attention_prefix(layer.layer_idx)
        for kind in ("weight", "bias"):
            counts[f"{prefix}.{streamed.arch.key}.{kind}"] = len(layer.key_groups)
            counts[f"{prefix}.{streamed.arch.value}.{kind}"] = len(layer.value_groups)
    spec = {}
    for name, shape in checkpoint.shapes.items():
        if ignorable(name):
            continue
        kept = (counts[name] * d, *shape[1:]) if name in counts else shape
        stored = checkpoint.dtypes[name]
        spec[name] = (dtype if dtype is not None and stored.is_floating_point else stored, kept)
    writer = SafetensorsWriter(partial, spec, resume=resumed)
    if not resumed:
        state.mkdir(exist_ok=True)
        (state / "plan.json").write_text(plan.to_json())
        (partial / RESUME).write_text(json.dumps({"command": "fuse", "fingerprint": plan.source.fingerprint}))
    in_layers = tuple(streamed.arch.layer_prefix(i) + "." for i in range(streamed.num_layers))
    for name in spec:
        if not name.startswith(in_layers):
            writer.write(name, checkpoint.read(name))
    return writer, done
