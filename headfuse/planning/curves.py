"""What every layout is predicted to lose at every budget, from the measured costs that its allocator reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from headfuse.choices import Layout
from headfuse.config.fuse import BudgetConfig, FuseConfig
from headfuse.errors import BudgetError, ConfigError, UnsupportedModelError
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS, slot_table
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import HeadLayout
from headfuse.planning.budget import BudgetRules
from headfuse.planning.costs import CostTable
from headfuse.planning.planner import ProgressCallback, plan_options, survey
from headfuse.text.calibration import CalibrationText

SHARES = tuple(Fraction(share) for share in ("1/8", "1/6", "1/4", "1/3", "3/8", "1/2", "5/8", "3/4", "7/8"))
"""Shares of the cache that are tried."""
WIDE_GQA = "gqa, wide"
"""Layout gqa with `--head-dim auto`."""


@dataclass(frozen=True)
class Point:
    """The share of the cache that is kept, and the NLL that the closed form is predicted to add, in nats per token."""

    kv_ratio: float
    nll_gap: float


def check_curves(config: FuseConfig) -> None:
    """Refuse what no curve predicts.

    Raises:
        ConfigError: for a method that trains, and for layers that read other layers.
    """
    if FUSION_METHODS[config.method].trained:
        raise ConfigError(
            f"method {config.method} trains, and curves are of the closed form", where="--curves",
            fix="leave one of the two out",
        )  # fmt: skip
    if config.budget.cross_layer:
        raise ConfigError(
            "curves are of layers that read their own cache alone", where="--cross-layer",
            fix="leave --cross-layer or --curves out",
        )  # fmt: skip


def curves(
    source: Source, streamed: StreamedModel, text: CalibrationText, config: FuseConfig, on_progress: ProgressCallback
) -> dict[str, list[Point]]:
    """A curve for each layout that this model can have, points in the order of their budgets.

    Costs add up only roughly, so the curves show where the loss bends and which layout loses less, not the exact NLL
    (docs/experiments.md).

    Args:
        source: the opened source.
        streamed: the same, layer by layer.
        text: the calibration text.
        config: the options of `analyze`; the costs are those of its method and preset, measured around a half.
        on_progress: called with the layout, the layers done and all layers.
    """
    found, heads = dict[str, list[Point]](), source.heads
    for layout in ("decoupled", "layerwise", "latent"):
        stock: Layout | None = "gqa" if layout == "layerwise" and _fits(source, "gqa") else None
        if not _fits(source, layout) and stock is None:
            continue
        if LAYOUTS[layout].wide and not FUSION_METHODS[config.method].wide:
            continue
        options = plan_options(config.model_copy(update={"layout": layout, "budget": BudgetConfig(total="1/2")}))

        def progress(_: str, done: int, total: int, layout: str = layout) -> None:
            on_progress(f"curve of {layout}", done, total)

        costs = survey(streamed, text, options, progress, every_cost=True).costs
        if costs is None:
            continue
        if _fits(source, layout):
            found[layout] = _allocated(options.rules, heads, costs)
        if stock is not None:
            found[stock] = _equal(range(1, heads.num_key_value_heads), heads.num_key_value_heads, costs, divisors=True)
        if layout == "latent" and _fits_width(source):
            counted = options.rules.counted(heads)
            found[WIDE_GQA] = _equal([round(share * counted) for share in SHARES], counted, costs)
    return found


def _fits(source: Source, layout: Layout) -> bool:
    """Whether a layout can hold this model."""
    try:
        LAYOUTS[layout].check(source.config)
    except UnsupportedModelError:
        return False
    return True


def _fits_width(source: Source) -> bool:
    """Whether the model's own class can have heads of another width."""
    try:
        slot_table.check(source.config)
    except UnsupportedModelError:
        return False
    return _fits(source, "gqa")


def _allocated(rules: BudgetRules, heads: HeadLayout, costs: CostTable) -> list[Point]:
    """The best allocation of every share that the rules can meet."""
    points = dict[float, Point]()
    for share in SHARES:
        try:
            budget = replace(rules, total=share).allocate("sensitivity", heads, costs)
        except BudgetError:
            continue
        kept = budget.total * rules.channels(heads) / heads.kv_channels
        points.setdefault(kept, Point(kept, costs.of(budget)))
    return list(points.values())


def _equal(counts: Sequence[int], full: int, costs: CostTable, divisors: bool = False) -> list[Point]:
    """The same count in every layer, for keys and for values."""
    wanted = sorted({count for count in counts if 0 < count < full and (not divisors or full % count == 0)})
    return [Point(c / full, sum(min(row[:c]) for row in costs.rows)) for c in wanted]


def plot_curves(found: dict[str, list[Point]], path: Path) -> None:
    """Predicted loss against the share of the cache that is kept, one line for each layout, as a PNG or SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, points in found.items():
        axis.plot([p.kv_ratio for p in points], [p.nll_gap for p in points], marker="o", label=name)
    axis.set(xlabel="share of the KV cache kept", ylabel="predicted NLL gap of the closed form", yscale="symlog")
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
