"""Lossless re-layout of a folder: stock `gqa`, `layerwise`, or one GGUF file (mathematics.md section 11)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from headfuse.checkpoint.finish import finish_folder
from headfuse.checkpoint.output import output_file, output_folder
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.choices import FileType, Target, names
from headfuse.conversion.export_plan import ExportPlan, moved_plan, plan_export, written_config
from headfuse.errors import ConfigError
from headfuse.layouts import gqa
from headfuse.layouts.gguf import writer as gguf
from headfuse.models.attention import AttentionWeights, stored_tensors
from headfuse.models.families import architecture_of
from headfuse.models.loading import load_tokenizer, unembedded_tokens, warn_of_unembedded
from headfuse.reporting.card import exported_section, extended_card


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
            config=written_config(plan),
            card=extended_card(folder.path, plan.output.name, exported_section(plan)),
            options={},
            plan=moved_plan(plan),
            trust_remote_code=plan.trust_remote_code,
        )
    return plan.output


def _spec(plan: ExportPlan) -> dict[str, torch.Tensor]:
    """Every tensor of the output, without data, in the order in which `_tensors` reads them."""
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
    """The tensors of the output, by name; a layer's attention comes as a whole, at the place of its first tensor."""
    folder, seen = plan.folder, set[int]()
    arch, target = folder.arch, architecture_of(folder.heads.model_type)
    places = {name: arch.place(name) for name in folder.checkpoint.shapes}
    for name, (layer_idx, inner) in places.items():
        prefix = name.removesuffix(inner)
        if layer_idx is None or not arch.owns(inner):
            own = stored_tensors({inner: read(name)}, target)
        elif layer_idx not in seen:
            seen.add(layer_idx)
            own = {n: read(prefix + n) for owner, n in places.values() if owner == layer_idx and arch.owns(n)}
            layer = plan.layers[layer_idx]
            if plan.wide is not None:
                weights = AttentionWeights.of_layer(own, arch, folder.heads)
                weights = gqa.arrange(weights, plan.wide.layers[layer_idx], plan.wide)
                own = weights.in_layer(own, arch, plan.wide.written_heads, target)
            elif not layer.unchanged or arch != target:
                weights = layer.arrange(AttentionWeights.of_layer(own, arch, folder.heads))
                own = weights.in_layer(own, arch, folder.heads, target)
        else:
            continue
        yield from ((prefix + n, tensor) for n, tensor in own.items())
