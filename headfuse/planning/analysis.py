"""Similarity, redundancy and the proposed plan of a model, from one streamed pass over calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headfuse.config.command import ANALYZE
from headfuse.config.fuse import FuseConfig
from headfuse.models.loading import pick_device
from headfuse.models.source import Source
from headfuse.models.source_layer import SourceLayer
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan
from headfuse.planning.curves import Point, check_curves
from headfuse.planning.curves import curves as predicted_curves
from headfuse.planning.layout_choice import check_budget, with_layout, with_possible_width
from headfuse.planning.planner import PlanOptions, ProgressCallback, Survey, plan_model, plan_options, survey
from headfuse.planning.similarity import aligned_similarity, linear_cka, redundancy
from headfuse.planning.spectrum import LayerSpectrum, Spectrum, layer_spectrum, predictions


@dataclass(frozen=True)
class SideAnalysis:
    """Similarity matrices `[n, n]` of one layer's key heads or value heads, and their mean over pairs."""

    cka: list[list[float]]
    aligned: list[list[float]]
    cka_redundancy: float
    redundancy: float


@dataclass(frozen=True)
class Analysis:
    """Per layer, for keys and for values, the similarities; and the plan that the budget leads to."""

    keys: list[SideAnalysis]
    values: list[SideAnalysis]
    plan: FusionPlan
    curves: dict[str, list[Point]] | None = None
    """Of planning/curves.py, where they were asked for."""
    spectrum: Spectrum | None = None
    """Of planning/spectrum.py, where it was asked for."""


def analyze(
    model: str | Path,
    config: FuseConfig | str | Path | None = None,
    *,
    curves: bool = False,
    spectrum: bool = False,
    on_progress: ProgressCallback = lambda phase, done, total: None,
    **options: Any,
) -> Analysis:
    """Measure how alike the heads of every layer are, and propose a plan for the budget.

    Args:
        model: folder or hub id of a model of a supported family.
        config: a `FuseConfig`, a YAML file or the name of a packaged config.
        curves: predict what every layout loses at every budget, too; takes a survey more for each kind of layout.
        spectrum: decompose the projections and the cache of every layer, and compare that with the measured costs.
        on_progress: called with phase, done and total layers.
        **options: those of `headfuse.fuse` by name, except `dtype`; they win over `config`.

    Raises:
        HeadfuseError: for every kind of bad input.
    """
    config, machine = ANALYZE.read(config, options)
    if curves:
        check_curves(config)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    source = Source.open(str(model), machine.trust_remote_code)
    config = with_possible_width(with_layout(config, source.config)[0], source)
    check_budget(config, source)
    text = source.calibration_text(config.calibration, config.seed, machine.trust_remote_code)
    streamed = StreamedModel(source.checkpoint, source.config, pick_device(machine.device))
    planned, cka = plan_options(config), list[tuple[torch.Tensor, torch.Tensor]]()
    spectra = list[LayerSpectrum]()

    def measure(layer: SourceLayer) -> None:
        cka.append((linear_cka(layer.weights.key), linear_cka(layer.weights.value)))
        if spectrum:
            spectra.append(layer_spectrum(layer, source.heads))

    found = survey(streamed, text, planned, on_progress, measure, every_cost=spectrum, pairs=True)
    layers = list(zip(cka, found.layers, strict=True))
    keys = [_side(each, layer.key_pairs, layer.key_energy) for (each, _), layer in layers]
    values = [_side(each, layer.value_pairs, layer.value_energy) for (_, each), layer in layers]
    every = predicted_curves(source, streamed, text, config, on_progress) if curves else None
    decomposed = Spectrum(spectra, predictions(spectra, _equal_costs(source, planned, found))) if spectrum else None
    plan = plan_model(source, streamed, text, planned, found, on_progress)
    return Analysis(keys, values, plan, every, decomposed)


def _equal_costs(source: Source, options: PlanOptions, found: Survey) -> dict[str, list[float]] | None:
    """What each layer's sides cost at the plan's budget with equal counts; None where costs were not measured."""
    if found.costs is None or not found.measured:
        return None
    equal = options.rules.allocate("uniform", source.heads)
    sides = {"key": (found.costs.key, equal.key_heads), "value": (found.costs.value, equal.value_heads)}
    return {
        side: [row[count - 1] for row, count in zip(rows, counts, strict=True)]
        for side, (rows, counts) in sides.items()
    }


def _side(cka: torch.Tensor, pairs: list[list[float]], energy: list[float]) -> SideAnalysis:
    aligned = aligned_similarity(torch.tensor(pairs), torch.tensor(energy))
    return SideAnalysis(cka.tolist(), aligned.tolist(), redundancy(cka), redundancy(aligned))


def plot(analysis: Analysis, folder: Path) -> list[Path]:
    """Heat maps of the head similarities, one PNG for keys and one for values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for side, layers in (("key", analysis.keys), ("value", analysis.values)):
        figure, axes = pyplot.subplots(
            2, len(layers), figsize=(1.6 * len(layers) + 1.5, 4), squeeze=False, layout="constrained"
        )
        image: Any = None
        for index, layer in enumerate(layers):
            for row, (name, matrix) in enumerate((("CKA", layer.cka), ("aligned", layer.aligned))):
                axis = axes[row][index]
                image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
                axis.set(xticks=[], yticks=[])
                if row == 0:
                    axis.set_title(f"layer {index}", fontsize=8)
                if index == 0:
                    axis.set_ylabel(name)
        figure.colorbar(image, ax=axes, shrink=0.8)
        figure.suptitle(f"Similarity of {side} heads")
        path = folder / f"{side}_similarity.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        paths.append(path)
    return paths
