"""Lossless re-layout of a folder: stock `gqa`, `layerwise`, or one GGUF file (mathematics.md section 11)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headfuse.checkpoint.finish import finish_folder
from headfuse.checkpoint.hub import default_parent
from headfuse.checkpoint.output import output_file, output_folder
from headfuse.checkpoint.output_checks import check_output, check_output_file
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.choices import FileType, Target, names
from headfuse.errors import CheckpointError, ConfigError, UnsupportedModelError
from headfuse.layouts import LAYOUTS, layerwise
from headfuse.layouts.assignment import StockHeads, common_group
from headfuse.layouts.folder import ModelFolder, open_folder, wide_heads
from headfuse.layouts.gguf import writer as gguf
from headfuse.models.attention import AttentionWeights
from headfuse.models.families import architecture_of
from headfuse.models.loading import load_tokenizer, names_code, unembedded_tokens, warn_of_unembedded
from headfuse.plan import FusionPlan, LayerPlan, query_order
from headfuse.reporting.card import exported_section, extended_card

CACHE_BYTES = 2
"""Bytes of a number in llama.cpp's KV cache, f16 unless the user says otherwise."""


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

    @property
    def num_key_value_heads(self) -> tuple[int, ...]:
        """KV heads of every layer."""
        return tuple(len(layer.keys) for layer in self.layers)

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """KV cache bytes per token of the folder and of the output, in the dtype of the output's cache."""
        after = 2 * sum(self.num_key_value_heads) * self.folder.heads.head_dim * self.itemsize
        return self.folder.kv_bytes_per_token(self.itemsize), after


def export(
    model: str | Path,
    to: Target,
    *,
    output: str | Path | None = None,
    file_type: FileType | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a model in another layout, without loss.

    Args:
        model: folder or hub id.
        to: the layout of a folder, or `gguf` for one file that llama.cpp reads.
        output: folder or file to write; by default it lies beside the model, with the layout in its name.
        file_type: numbers in a GGUF file; by default `f16`.
        overwrite: replace an existing output.
        trust_remote_code: allow the model's own code.

    Raises:
        HeadfuseError: for every kind of bad input; nothing appears under the output name.
    """
    if to not in names(Target):
        raise ConfigError(f"{to!r} is unknown", where="--to", fix=f"give one of {', '.join(names(Target))}")
    if file_type is not None and file_type not in names(FileType):
        raise ConfigError(f"{file_type!r} is unknown", where="--type", fix=f"give one of {', '.join(names(FileType))}")
    path = None if output is None else Path(output)
    plan = plan_export(str(model), to, output=path, file_type=file_type, trust_remote_code=trust_remote_code)
    return write_export(plan, file_type=file_type or "f16", overwrite=overwrite)


def plan_export(
    model: str, to: Target, *, output: Path | None = None, file_type: str | None = None, trust_remote_code: bool = False
) -> ExportPlan:
    """What `write_export` would write; reads headers alone.

    Raises:
        UnsupportedModelError: where no lossless re-layout exists, or none that is smaller than the source.
        HeadfuseError: for every other kind of bad input.
    """
    if to != "gguf" and file_type is not None:
        raise ConfigError("is the type of numbers in a GGUF file", where="--type", fix="leave it out, or use --to gguf")
    folder = open_folder(model, trust_remote_code)
    _check_exportable(folder)
    folder.weights.report()
    if names_code(folder.path):  # what needs code that is not trusted cannot go into the output
        load_tokenizer(folder.path, trust_remote_code)
    if to == folder.layout:
        raise ConfigError(f"is a folder of layout {to} already", where=folder.path, fix="use it as it is")
    if to != "gguf":
        LAYOUTS[to].check(folder.family_config)
    group = common_group(folder.assignments)
    layers = tuple(m.stock_heads(group if to == "gqa" else m.group) for m in folder.assignments)
    _check_exact(folder, to, layers)
    counts = [len(layer.keys) for layer in layers]
    if to == "gguf":
        name = gguf.architecture(folder.family_config, counts, folder.path).name
        gguf.require_gguf()
    else:
        name = _config(folder, to, counts)["architectures"][0]
    suffix = f"-{file_type or 'f16'}.gguf" if to == "gguf" else f"-{to}"
    stored = Counter(folder.checkpoint.dtypes.values()).most_common(1)[0][0]
    return ExportPlan(
        folder, to, output or default_parent(folder.path) / f"{folder.name}{suffix}", layers, name,
        CACHE_BYTES if to == "gguf" else stored.itemsize, trust_remote_code,
    )  # fmt: skip


def _check_exportable(folder: ModelFolder) -> None:
    """Refuse key heads with rotary slots, which no stock class has, and a plan of another model."""
    if folder.layout == "latent":
        raise wide_heads(folder.path)
    for layer_idx, slots in enumerate(getattr(folder.config, "rotary_slots", None) or ()):
        if slots is not None:
            raise UnsupportedModelError(
                f"layer {layer_idx}: its key heads choose their rotary frequencies (rotary slots), which a "
                "stock rotary embedding cannot compute",
                where=folder.path,
                fix="fuse the source with --layout gqa or --layout layerwise, which keep the stock order",
            )
    shape = ("num_hidden_layers", "num_attention_heads", "head_dim")
    if folder.plan is not None and any(getattr(folder.plan.heads, n) != getattr(folder.heads, n) for n in shape):
        raise CheckpointError(
            "plan.json is of a model of another shape than config.json",
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
            f"{', '.join(map(str, sizes))} query heads read the same pair of key head and value head, so that only "
            f"{len(layers[worst].keys)} KV heads compute the same"
            + (", and one count for all layers" if to == "gqa" else "")
            + f": {wanted} heads in all, and the source had {folder.source_heads}",
            where=folder.path,
            fix=fix,
        )
    if folder.arch.key_norm == "layer" and any(len(set(Counter(layer.keys).values())) > 1 for layer in layers):
        raise UnsupportedModelError(
            "its norm is over all key heads of a layer, and some would have to be there more often than others",
            where=folder.path,
            fix="fuse the source with --layout gqa",
        )


def write_export(
    plan: ExportPlan,
    *,
    file_type: str = "f16",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write what `plan_export` planned, with one layer's attention in memory at a time.

    Args:
        plan: from `plan_export`.
        file_type: of a GGUF file: `f16`, `f32` or `q8_0`.
        overwrite: replace an existing output.
        on_progress: called with the tensors done and all tensors.

    Raises:
        OutputError: when the output exists or cannot be written; nothing appears under its name.
        UnsupportedModelError: for what llama.cpp does not compute.
    """
    folder, place = plan.folder, {"overwrite": overwrite, "reads": [plan.folder.path]}
    if plan.target == "gguf":
        tokenizer = load_tokenizer(folder.path, plan.trust_remote_code)
        warn_of_unembedded(unembedded_tokens(tokenizer, folder.family_config.vocab_size), folder.path)  # they are cut
        with output_file(plan.output, **place) as partial:  # type: ignore[arg-type]
            gguf.write(
                partial, folder.name, folder.family_config, plan.num_key_value_heads, tokenizer,
                _shapes(plan), _tensors(plan, on_progress), file_type, folder.path,
            )  # fmt: skip
        return plan.output
    with output_folder(plan.output, **place) as partial:  # type: ignore[arg-type]
        shapes = _shapes(plan)
        dtypes = _dtypes(plan)
        writer = SafetensorsWriter(partial, {name: (dtypes[name], shape) for name, shape in shapes.items()})
        for name, tensor in _tensors(plan, on_progress):
            writer.write(name, tensor)
        finish_folder(
            partial,
            folder.path,
            config=_config(folder, plan.target, plan.num_key_value_heads),
            card=extended_card(folder.path, plan.output.name, exported_section(plan)),
            options={},
            plan=folder.plan and _moved(folder.plan, plan),
            trust_remote_code=plan.trust_remote_code,
        )
    return plan.output


def check_export(plan: ExportPlan, overwrite: bool = False) -> None:
    """Raise OutputError when the output of a plan cannot be written."""
    check = check_output_file if plan.target == "gguf" else check_output
    check(plan.output, overwrite=overwrite, reads=[plan.folder.path])


def _config(folder: ModelFolder, to: Target, counts: Any) -> dict[str, Any]:
    if to == "layerwise":
        return layerwise.layerwise_config(folder.family, tuple(counts))
    return {**folder.family, "num_key_value_heads": counts[0]}


def _layer_of(plan: ExportPlan, name: str) -> int | None:
    """The layer whose attention holds a stored tensor."""
    arch = plan.folder.arch
    for layer_idx in range(len(plan.layers)):
        prefix = arch.layer_prefix(layer_idx) + "."
        if name.startswith(prefix) and arch.owns(name.removeprefix(prefix)):
            return layer_idx
    return None


def _spec(plan: ExportPlan) -> dict[str, torch.Tensor]:
    """Every tensor of the output, without content, in the order in which `_tensors` reads them."""
    checkpoint = plan.folder.checkpoint
    empty = {n: torch.empty(s, dtype=checkpoint.dtypes[n], device="meta") for n, s in checkpoint.shapes.items()}
    return dict(_arranged(plan, empty.__getitem__))


def _shapes(plan: ExportPlan) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _spec(plan).items()}


def _dtypes(plan: ExportPlan) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in _spec(plan).items()}


def _tensors(plan: ExportPlan, on_progress: Callable[[int, int], None]) -> Iterator[tuple[str, torch.Tensor]]:
    total = len(_spec(plan))
    for done, (name, tensor) in enumerate(_arranged(plan, plan.folder.checkpoint.read), start=1):
        yield name, tensor
        on_progress(done, total)


def _arranged(plan: ExportPlan, read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the output, by name; the attention of a layer comes whole where its first tensor was."""
    folder, seen = plan.folder, set[int]()
    arch, target = folder.arch, architecture_of(folder.heads.model_type)
    owners = {name: _layer_of(plan, name) for name in folder.checkpoint.shapes}
    for name, layer_idx in owners.items():
        if layer_idx is None:
            yield name, read(name)
        elif layer_idx not in seen:
            seen.add(layer_idx)
            prefix = arch.layer_prefix(layer_idx) + "."
            own = {n.removeprefix(prefix): read(n) for n, owner in owners.items() if owner == layer_idx}
            layer = plan.layers[layer_idx]
            if not layer.unchanged or arch != target:
                weights = layer.arrange(AttentionWeights.of_layer(own, arch, folder.heads))
                own = weights.in_layer(own, arch, folder.heads, target)
            yield from ((prefix + n, tensor) for n, tensor in own.items())


def _moved(plan: FusionPlan, export: ExportPlan) -> FusionPlan:
    """The plan of the output: the source heads of each of its KV heads."""
    layers = []
    for layer, stock in zip(plan.layers, export.layers, strict=True):
        shared = plan.layout != "decoupled"  # its query heads were permuted
        before = query_order(layer.key_groups, plan.heads) if shared else range(plan.heads.num_attention_heads)
        heads = [plan.heads.source_head(before[query]) for query in stock.queries]
        chunks = [heads[start : start + stock.group] for start in range(0, len(heads), stock.group)]
        groups = tuple(tuple(dict.fromkeys(chunk)) for chunk in chunks)
        layers.append(LayerPlan(layer_idx=layer.layer_idx, key_groups=groups, value_groups=groups))
    return plan.model_copy(update={"layout": export.target, "layers": tuple(layers)})
