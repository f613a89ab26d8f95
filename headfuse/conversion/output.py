"""The folder that a conversion writes: weights, config, and the files beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from headfuse.checkpoint.folder import copy_companions
from headfuse.checkpoint.hub import default_parent
from headfuse.checkpoint.output import STATE, write_resume, write_whole
from headfuse.checkpoint.plan_file import write_plan
from headfuse.checkpoint.reader import DTYPE_NAMES, Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.config.fuse import FuseConfig
from headfuse.conversion.result import FuseResult
from headfuse.conversion.resume import FinishedLayers, layers_done
from headfuse.layouts import LAYOUTS
from headfuse.models.attention import AttentionWeights
from headfuse.models.canonical import CanonicalCheckpoint
from headfuse.models.families import Architecture
from headfuse.models.loading import keep_tokenizer_class
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan
from headfuse.reporting.card import fused_card


def default_output(source: Source, config: FuseConfig, plan: FusionPlan | None = None) -> Path:
    """`<model>-headfuse-<budget>` beside the model; in the working directory for one of the hub."""
    label = config.budget.label if plan is None else f"{plan.kv_ratio:.4g}"
    return default_parent(source.folder) / f"{source.name.rsplit('/')[-1]}-headfuse-{label}"


def open_writer(
    source: Source, streamed: StreamedModel, plan: FusionPlan, partial: Path, options: dict[str, Any]
) -> tuple[SafetensorsWriter, FinishedLayers]:
    """Lay out the output files, copy what does not change, and read which layers an earlier run finished."""
    state, checkpoint, arch = partial / STATE, streamed.checkpoint, streamed.arch
    dtype = None if options["dtype"] is None else DTYPE_NAMES[options["dtype"]]
    done = layers_done(state / "done.json")
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
    return writer, FinishedLayers(state / "done.json", writer, done or [])


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
        weights = layout.sized(AttentionWeights.of_layer(tensors, arch, heads), layer, plan)
        written = weights.in_layer(tensors, arch, heads, layout.stored(arch))
        for name in own:
            if name.removeprefix(prefix) not in written:
                del spec[name]
        spec.update({prefix + name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()})
    return spec


def write_config(partial: Path, source: Source, plan: FusionPlan, dtype: str | None) -> None:
    """Write the config.json of the fused model."""
    raw = source.raw_config()
    if dtype is not None:
        raw.pop("torch_dtype", None)
        raw["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(LAYOUTS[plan.layout].config(raw, plan), indent=2) + "\n")


def write_beside_weights(
    partial: Path, source: Source, result: FuseResult, config: FuseConfig, writer: SafetensorsWriter
) -> None:
    """Everything but weights and config: tokenizer and licence, headfuse.yaml, card, plan.json with checksums."""
    plan = result.plan
    copy_companions(source.folder, partial, source.trust_remote_code)
    if not LAYOUTS[plan.layout].stock_class:
        keep_tokenizer_class(source.folder, partial)
    head = f"# headfuse fuse --config headfuse.yaml {plan.source.model}\n"
    (partial / "headfuse.yaml").write_text(head + config.to_yaml(), encoding="utf-8")
    (partial / "README.md").write_text(fused_card(source, result), encoding="utf-8")
    write_plan(partial, plan, writer.checksums())
