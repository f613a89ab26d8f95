"""What an export will write: heads, cache bytes and the class that loads it; refuses what would not be lossless."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headfuse.checkpoint.hub import default_parent
from headfuse.checkpoint.output_checks import check_output, check_output_file
from headfuse.choices import Target
from headfuse.errors import CheckpointError, ConfigError, UnsupportedModelError
from headfuse.layouts import LAYOUTS, gqa, layerwise
from headfuse.layouts.assignment import StockHeads, common_group, query_order
from headfuse.layouts.folder import ModelFolder, open_folder
from headfuse.layouts.gguf import writer as gguf
from headfuse.layouts.latent_as_gqa import as_gqa
from headfuse.models.loading import load_tokenizer, names_code
from headfuse.plan import FusionPlan, LayerPlan

CACHE_BYTES = 2
"""Bytes per number in llama.cpp's KV cache: f16, unless the user chooses another type."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write: heads and cache bytes, before and after."""

    folder: ModelFolder
    target: Target
    output: Path
    layers: tuple[StockHeads, ...]
    architecture: str
    """The class, or llama.cpp's name, that loads the output."""
    itemsize: int
    trust_remote_code: bool = False
    wide: FusionPlan | None = None
    """The plan of the output where read maps of wide heads are folded into a stock class."""

    @property
    def num_key_value_heads(self) -> tuple[int, ...]:
        """KV heads of every layer."""
        return tuple(len(layer.keys) for layer in self.layers)

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """KV cache bytes per token of the folder and of the output, in the dtype of the output's cache."""
        width = self.folder.heads.head_dim if self.wide is None else self.wide.written_heads.head_dim
        after = 2 * sum(self.num_key_value_heads) * width * self.itemsize
        return self.folder.kv_bytes_per_token(self.itemsize), after


def plan_export(
    model: str, to: Target, *, output: Path | None = None, file_type: str | None = None, trust_remote_code: bool = False
) -> ExportPlan:
    """Plan what `write_export` will write; reads headers only.

    Raises:
        UnsupportedModelError: where no lossless re-layout exists, or none that is smaller than the source.
        HeadfuseError: for every other kind of bad input.
    """
    if to != "gguf" and file_type is not None:
        raise ConfigError("is the type of numbers in a GGUF file", where="--type", fix="leave it out, or use --to gguf")
    folder = open_folder(model, trust_remote_code)
    wide = as_gqa(folder) if (folder.layout, to) == ("latent", "gqa") else None
    _check_exportable(folder, to)
    folder.weights.report()
    if names_code(folder.path):  # what needs code that is not trusted cannot go into the output
        load_tokenizer(folder.path, trust_remote_code)
    if to == folder.layout:
        raise ConfigError(f"is a folder of layout {to} already", where=folder.path, fix="use it as it is")
    if to != "gguf":
        LAYOUTS[to].check(folder.family_config)
    layers = _stock_layers(folder, to) if wide is None else _grouped_layers(wide)
    suffix = f"-{file_type or 'f16'}.gguf" if to == "gguf" else f"-{to}"
    stored = Counter(folder.checkpoint.dtypes.values()).most_common(1)[0][0]
    plan = ExportPlan(
        folder, to, output or default_parent(folder.path) / f"{folder.name}{suffix}", layers, "",
        CACHE_BYTES if to == "gguf" else stored.itemsize, trust_remote_code, wide,
    )  # fmt: skip
    if to == "gguf":
        name = gguf.architecture(folder.family_config, plan.num_key_value_heads, folder.path).name
        gguf.require_gguf()
    else:
        name = written_config(plan)["architectures"][0]
    return replace(plan, architecture=name)


def _stock_layers(folder: ModelFolder, to: Target) -> tuple[StockHeads, ...]:
    """The stock layers that compute the same; refuses where they are no smaller than the source's."""
    group = common_group(folder.assignments)
    layers = tuple(m.stock_heads(group if to == "gqa" else m.group) for m in folder.assignments)
    _check_exact(folder, to, layers)
    return layers


def _grouped_layers(plan: FusionPlan) -> tuple[StockHeads, ...]:
    """The stock layers of a plan: one KV head for each of its groups."""
    order = [tuple(query_order(layer.key_groups, plan.heads)) for layer in plan.layers]
    kept = [tuple(range(len(layer.key_groups))) for layer in plan.layers]
    return tuple(StockHeads(queries, heads, heads) for queries, heads in zip(order, kept, strict=True))


def _check_exportable(folder: ModelFolder, to: Target) -> None:
    """Refuse key heads with rotary slots or of other widths, which a stock class lacks, and a plan of another model."""
    if folder.layout == "latent" and to != "gqa":
        raise UnsupportedModelError(
            "its key heads and value heads are wide (layout latent)",
            where=folder.path,
            fix="export it with --to gqa first, which says whether a stock class can have them",
        )
    if to == "layerwise" and folder.plan is not None and folder.plan.head_width is not None:
        raise UnsupportedModelError(
            "layout layerwise has heads of the source's width, and these have another (--head-dim)",
            where=folder.path,
            fix="use the folder as it is, or fuse the source with --layout layerwise",
        )
    for layer_idx, slots in enumerate((folder.layout == "decoupled" and folder.config.rotary_slots) or ()):
        if slots is not None:
            raise UnsupportedModelError(
                f"layer {layer_idx}: its key heads choose their rotary frequencies (rotary slots), which a "
                "stock rotary embedding cannot compute",
                where=folder.path,
                fix="fuse the source with --layout gqa or --layout layerwise, which keep the stock order",
            )
    shape = ("num_hidden_layers", "num_attention_heads", "head_dim")
    written = None if folder.plan is None else folder.plan.written_heads
    if written is not None and any(getattr(written, n) != getattr(folder.heads, n) for n in shape):
        raise CheckpointError(
            "plan.json and config.json describe models of different shapes",
            where=folder.path,
            fix="restore both as headfuse wrote them",
        )


def _check_exact(folder: ModelFolder, to: Target, layers: tuple[StockHeads, ...]) -> None:
    """Refuse a stock form that is no smaller than the source, or that a norm over all key heads makes inexact."""
    wanted = 2 * sum(len(layer.keys) for layer in layers)
    if wanted > folder.num_heads and wanted >= folder.source_heads:
        worst = max(range(len(layers)), key=lambda i: len(layers[i].keys))
        sizes = sorted(Counter(folder.assignments[worst].pairs).values())
        fix = "fuse the source with --layout gqa (every runtime)"
        fix += " or --layout layerwise (vLLM, llama.cpp)" * (folder.layout == "decoupled")
        raise UnsupportedModelError(
            f"a stock layer has groups of one size, shared by keys and values; in layer {worst}, sets of "
            f"{', '.join(map(str, sizes))} query heads read the same pair of key head and value head, so an equal "
            f"stock layer needs {len(layers[worst].keys)} KV heads"
            + (", and one count for all layers" if to == "gqa" else "")
            + f": {wanted} heads over all layers, and the source had {folder.source_heads}",
            where=folder.path,
            fix=fix,
        )
    if folder.arch.key_norm == "layer" and any(len(set(Counter(layer.keys).values())) > 1 for layer in layers):
        raise UnsupportedModelError(
            "its norm runs over all key heads of a layer, and storing some heads more often would change it",
            where=folder.path,
            fix="fuse the source with --layout gqa",
        )


def check_export(plan: ExportPlan, overwrite: bool = False) -> None:
    """Raise OutputError when the output of a plan cannot be written."""
    check = check_output_file if plan.target == "gguf" else check_output
    check(plan.output, overwrite=overwrite, reads=[plan.folder.path])


def written_config(plan: ExportPlan) -> dict[str, Any]:
    """The config.json of the output."""
    folder = plan.folder
    if plan.wide is not None:
        return gqa.config(folder.family, plan.wide)
    if plan.target == "layerwise":
        return layerwise.layerwise_config(folder.family, plan.num_key_value_heads)
    return {**folder.family, "num_key_value_heads": plan.num_key_value_heads[0]}


def moved_plan(export: ExportPlan) -> FusionPlan | None:
    """The plan of the output: the source heads of each of its KV heads. None where the folder has none."""
    plan, layers = export.folder.plan, list[LayerPlan]()
    if plan is None or export.wide is not None:
        return export.wide
    for layer, stock in zip(plan.layers, export.layers, strict=True):
        shared = plan.layout != "decoupled"  # its query heads were permuted
        before = query_order(layer.key_groups, plan.heads) if shared else range(plan.heads.num_attention_heads)
        heads = [plan.heads.source_head(before[query]) for query in stock.queries]
        chunks = [heads[start : start + stock.group] for start in range(0, len(heads), stock.group)]
        groups = tuple(tuple(dict.fromkeys(chunk)) for chunk in chunks)
        layers.append(LayerPlan(layer_idx=layer.layer_idx, key_groups=groups, value_groups=groups))
    return plan.model_copy(update={"layout": export.target, "layers": tuple(layers)})
