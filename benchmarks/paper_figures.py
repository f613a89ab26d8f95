"""Figures 2, 3 and 8 of DHA (arXiv 2406.06567) for a model: `python benchmarks/paper_figures.py MODEL --data TEXT`.

`key_similarity.png` and `value_similarity.png` are its figure 2: similarity of the heads of every layer, by CKA of
their weights and after the best alignment. `redundancy.png` is figure 3: what fusing the heads of one layer to a share
of their number does to the model's output, and the redundancy of every layer. `head_budget.png` is figure 8: heads per
layer before, and after by the measured costs and by the paper's greedy on the same costs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import headfuse
from headfuse.choices import Side
from headfuse.config.fuse import load_config
from headfuse.models.loading import pick_device
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import HeadBudget
from headfuse.planning.analysis import Analysis, plot
from headfuse.planning.fused_variants import Costs
from headfuse.planning.planner import plan_options, survey

SIDES: tuple[Side, ...] = ("key", "value")


def main() -> None:
    """Measure and draw."""
    import matplotlib

    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="examples/mha-6m")
    parser.add_argument("--data", default="default")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--budget", default="1/4")
    parser.add_argument("--method", default="mean", help="how the heads are fused in figure 3")
    parser.add_argument("--output", type=Path, default=Path("docs/how-it-works/figures"))
    options = parser.parse_args()
    overrides = {
        "budget.total": options.budget, "method": options.method, "preset": "best",
        "layout": "decoupled", "calibration.data": options.data,
        "calibration.samples": options.samples, "calibration.sequence_length": options.sequence_length,
    }  # fmt: skip
    config = load_config(None, overrides)
    source = Source.open(options.model)
    streamed = StreamedModel(source.checkpoint, source.config, pick_device())
    text, decisions = source.calibration_text(config.calibration, config.seed), plan_options(config)
    found = survey(streamed, text, decisions, lambda phase, done, total: None)
    rules, (_, end_losses) = decisions.rules, found.measured[-1]
    budgets = {name: rules.allocate(name, source.heads, found.costs) for name in ("sensitivity", "dha-greedy")}
    # the allocator of the analysis is not drawn; `uniform` needs no second measurement
    similar = headfuse.analyze(options.model, load_config(None, {**overrides, "budget.allocator": "uniform"}))
    options.output.mkdir(parents=True, exist_ok=True)
    plot(similar, options.output)
    redundancy(end_losses, similar, options.method, options.output / "redundancy.png")
    head_budget(budgets, source.heads.num_key_value_heads, options.budget, options.output / "head_budget.png")
    for side, layers in zip(SIDES, (similar.keys, similar.values), strict=True):
        means = [
            sum(getattr(layer, name) for layer in layers) / len(layers) for name in ("cka_redundancy", "redundancy")
        ]
        middle = (source.heads.num_key_value_heads + 1) // 2
        half = sum(end_losses[i, side][middle] for i in range(streamed.num_layers))
        print(f"{side}: redundancy by CKA {means[0]:.3f}, aligned {means[1]:.3f}; KL at half, summed {half:.4f}")
    for name, budget in budgets.items():
        print(name, "keys", budget.key_heads, "values", budget.value_heads)


def redundancy(end_losses: Costs, similar: Analysis, method: str, path: Path) -> None:
    """Figure 3: loss against the share of heads, layer by layer; redundancy of every layer."""
    from matplotlib import colormaps, pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colours = colormaps["viridis"].resampled(len(similar.keys))
    for axis, side in zip(axes, SIDES, strict=False):
        for index in range(len(similar.keys)):
            measured = end_losses[index, side]
            shares = [count / max(measured) for count in sorted(measured)]
            losses = [measured[count] for count in sorted(measured)]
            axis.plot(shares, losses, "o-", ms=3, color=colours(index), label=f"layer {index}")
        axis.set(
            title=f"{side} heads of one layer, `{method}`", xlabel="share of heads kept", ylabel="KL from the source"
        )
        axis.set_ylim(0, 1.05 * max(max(row.values()) for row in end_losses.values()))
        axis.legend(fontsize=7, ncols=1 + len(similar.keys) // 16)
    for side, layers, style in (("key", similar.keys, "o-"), ("value", similar.values, "s--")):
        for name, attribute, colour in (("CKA", "cka_redundancy", "C0"), ("aligned", "redundancy", "C1")):
            figures = [getattr(layer, attribute) for layer in layers]
            axes[2].plot(figures, style, ms=4, color=colour, label=f"{side}, {name}")
    axes[2].set(title="Redundancy", xlabel="layer", ylabel="mean similarity of two heads", ylim=(0, 1))
    axes[2].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def head_budget(budgets: dict[str, HeadBudget], source: int, share: str, path: Path) -> None:
    """Figure 8: heads of every layer before and after."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(budgets), figsize=(5 * len(budgets), 3.4), sharey=True, layout="constrained")
    axis: Any
    for axis, (name, budget) in zip(axes, budgets.items(), strict=True):
        layers = range(len(budget.key_heads))
        axis.bar(layers, [source] * len(layers), width=0.9, color="0.92", label="source, each")
        axis.bar([i - 0.2 for i in layers], budget.key_heads, width=0.38, color="C0", label="key heads")
        axis.bar([i + 0.2 for i in layers], budget.value_heads, width=0.38, color="C1", label="value heads")
        axis.set(title=f"{name}, {share} of the cache", xlabel="layer", ylabel="heads")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
