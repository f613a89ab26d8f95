"""Plots of the report as inline SVG, with hatches and markers beside colours so that they can be read in print."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from headfuse.plan import FusionPlan
from headfuse.reporting.tables import kept


@dataclass(frozen=True)
class Chart:
    """A plot and the line under it."""

    svg: Markup
    caption: str


def heads_chart(plan: FusionPlan) -> Chart:
    """Bars of the key heads and value heads that each layer keeps; of their channels if heads are wide."""
    counted, source, keys, values = kept(plan)
    layers = range(plan.heads.num_hidden_layers)
    figure, axis = _axes(7.5, 3)
    width = 0.4
    for offset, counts, colour, hatch, name in (
        (-width / 2, keys, "#2b5c8a", "", f"key {counted}"),
        (width / 2, values, "#e8b04a", "///", f"value {counted}"),
    ):
        axis.bar([i + offset for i in layers], counts, width, color=colour, hatch=hatch, edgecolor="black", label=name)
    axis.axhline(source, color="black", linestyle="--", linewidth=1, label="source")
    axis.set(xlabel="layer", ylabel=counted, ylim=(0, source * 1.3))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(ncol=3, loc="upper center", frameon=False)
    return Chart(_svg(figure), f"Key {counted} and value {counted} that each layer keeps; dashed: the source.")


def agreement_chart(name: str, parts: Sequence[Mapping[str, Any]]) -> Chart:
    """Bars of KL divergence and top-1 agreement with the baseline, for each part of the text."""
    figure, axes = _axes(7.5, 2.8, columns=2)
    labels = [part["part"].replace("$", r"\$") for part in parts]
    titles = {"kl": "KL(baseline || model), nats", "top1_agreement": "same most likely token"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = [part[key]["value"] for part in parts]
        errors = [part[key]["stderr"] or 0.0 for part in parts]
        axis.bar(labels, values, yerr=errors, color="#9db8d2", edgecolor="black", capsize=3)
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="x", rotation=40, labelsize=8)
    return Chart(_svg(figure), f"Agreement with the baseline by {name}; error bars are one standard error.")


def training_chart(path: Path) -> Chart | None:
    """The curve of a training log; None if there is none. Foreign lines in the log are skipped."""
    records = _records(path) if path.is_file() else []
    drawn = []
    for key, name, dash in (("loss", "training loss", "-"), ("nll", "validation NLL", "--")):
        points = [(record["step"], record[key]) for record in records if _is_number(record.get(key))]
        drawn += [(points, name, dash)] if points else []
    if not drawn:
        return None
    figure, axes = _axes(7.5, 2.8, columns=len(drawn))
    for axis, (points, name, dash) in zip(axes if len(drawn) > 1 else [axes], drawn, strict=True):
        marker = "o" if len(points) < 40 else None
        axis.plot(*zip(*points, strict=True), dash, marker=marker, markersize=3, color="black")
        axis.set(title=name, xlabel="step")
    return Chart(_svg(figure), f"The curve of {path.name}.")


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log that are objects with a step."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _is_number(record.get("step")):
            records.append(record)
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _svg(figure: Any) -> Markup:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "headfuse"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return Markup(re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL))
