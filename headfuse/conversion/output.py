"""The folder that a conversion writes: its weight files, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headfuse.checkpoint.companions import FUSE_OPTIONS
from headfuse.checkpoint.disk import write_whole
from headfuse.checkpoint.finish import finish_folder
from headfuse.checkpoint.hub import default_parent
from headfuse.checkpoint.interrupted import STATE, write_resume
from headfuse.checkpoint.reader import DTYPE_NAMES, Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.config.fuse import FuseConfig
from headfuse.conversion.result import FuseResult
from headfuse.conversion.resume import FinishedLayers, layers_done
from headfuse.layouts import LAYOUTS
from headfuse.models.attention import AttentionWeights
from headfuse.models.canonical import CanonicalCheckpoint
from headfuse.models.config import with_dtype
from headfuse.models.families import Architecture
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan
from headfuse.reporting.card import fused_card, keep_licence_text


def default_output(source: Source, config: FuseConfig, plan: FusionPlan | None = None) -> Path:
    """`<model>-headfuse-<budget>` beside the model; in the working directory for one of the hub."""
    label = config.budget.label if plan is None else f"{plan.kv_ratio:.4g}"
    return default_parent(source.folder) / f"{source.name.rsplit('/')[-1]}-headfuse-{label}"


def open_writer(
    source: Source, streamed: StreamedModel, plan: FusionPlan, partial: Path, options: dict[str, Any]
) -> tuple[SafetensorsWriter, FinishedLayers]:
    """Create the output files, copy unchanged tensors, and find the layers that an earlier run finished."""
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
        written = weights.in_layer(tensors, arch, plan.written_heads, layout.stored(arch))
        for name in own:
            if name.removeprefix(prefix) not in written:
                del spec[name]
        spec.update({prefix + name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()})
    return spec


def fused_config(source: Source, plan: FusionPlan, dtype: str | None) -> dict[str, Any]:
    """The config.json of the fused model; `dtype` is that of the written weights, None the source's."""
    return LAYOUTS[plan.layout].config(with_dtype(source.raw_config(), dtype), plan)


def write_beside_weights(
    partial: Path,
    source: Source,
    result: FuseResult,
    config: FuseConfig,
    dtype: str | None,
    checksums: Mapping[str, str],
    reviewed: bool,
) -> None:
    """Complete the folder of a conversion, whose weights are written.

    Args:
        partial: the folder in the making.
        source: the opened source.
        result: for the model card and plan.json.
        config: for headfuse.yaml.
        dtype: of the written weights, None for the source's.
        checksums: of weight files, as far as the writer knows them.
        reviewed: the plan was given, so the options alone do not make it again.
    """
    plan = " --plan plan.json" if reviewed else ""
    command = f"# headfuse fuse --config {FUSE_OPTIONS}{plan} {result.plan.source.model}\n"
    keep_licence_text(source.folder, partial)
    finish_folder(
        partial,
        source.folder,
        config=fused_config(source, result.plan, dtype),
        card=fused_card(source, result),
        options={FUSE_OPTIONS: command + config.to_yaml()},
        plan=result.plan,
        checksums=checksums,
        trust_remote_code=source.trust_remote_code,
    )
