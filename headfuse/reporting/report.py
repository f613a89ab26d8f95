"""report.html: what was fused, what it cost and what it saves, in one file that needs nothing else.

Everything that comes from a file or an option is escaped; plots are inline SVG, with hatches and markers beside colours
so that they can be read in print.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headfuse.checkpoint.folder import TRAIN_LOG
from headfuse.checkpoint.output import write_whole
from headfuse.checkpoint.plan_file import read_plan
from headfuse.errors import CheckpointError, ConfigError, OutputError
from headfuse.plan import WIDE, FusionPlan
from headfuse.reporting.tables import figure_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #999 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; border: 1px solid #bbb }
td + td { text-align: right } th { text-align: left; background: #eee } .failed { font-weight: bold }
pre { background: #f4f4f4; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere }
svg, img { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption { font-size: 90% }
@media print { body { margin: 0; max-width: none; font-size: 11px } h2 { break-after: avoid }
 figure, table, pre, .whole { break-inside: avoid } th { background: none } }
"""


def write_report(
    path: Path, folder: Path, document: Mapping[str, Any] | None = None, analysis: Path | None = None
) -> None:
    """Write the report of a model folder.

    Args:
        path: the HTML file; it appears whole.
        folder: the model; plan.json and the training log are read where it has them.
        document: that of `headfuse eval --json`, for the figures.
        analysis: the output folder of `headfuse analyze`, for the heat maps.

    Raises:
        HeadfuseError: for a folder of which there is nothing to report, and files that cannot be read.
    """
    plan = read_plan(folder) if (folder / "plan.json").is_file() else None
    if plan is None and document is None:
        raise CheckpointError("holds no plan.json", where=folder, fix="give a folder that `headfuse fuse` wrote")
    sections = [
        _verdicts(document),
        _fused(plan),
        _heat_maps(analysis),
        _quality(document),
        _training(folder / TRAIN_LOG),
        _commands(folder, plan, document),
    ]
    name = document["model"]["name"] if document else folder.resolve().name
    title = f"headfuse report: {name}"
    body = "\n".join(section for section in sections if section)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{_e(title)}</h1>\n{body}\n</body></html>\n"
    )
    try:
        write_whole(path, page)
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror}", where=path, fix="check the path and its folder"
        ) from None


def read_document(path: Path) -> dict[str, Any]:
    """The document of `headfuse eval --json` in a file.

    Raises:
        ConfigError: where it is none.
    """
    fix = "write it with `headfuse eval ... --json > FILE`"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot be read: {' '.join(str(error).split())}", where=path.name, fix=fix) from None
    if not isinstance(document, dict) or document.get("command") != "eval" or "agreement" not in document:
        raise ConfigError("is not a document of eval", where=path.name, fix=fix)
    return document


def _verdicts(document: Mapping[str, Any] | None) -> str:
    if document is None or not document["gates"]:
        return ""
    rows = [
        [
            gate["gate"], "passed" if gate["passed"] else "FAILED", _number(gate["value"]), _number(gate["threshold"]),
            _number(gate["stderr"]), f"{gate['samples']} {gate['unit']}" if gate["samples"] else "",
        ]
        for gate in document["gates"]
    ]  # fmt: skip
    failed = sum(not gate["passed"] for gate in document["gates"])
    verdict = f"{failed} of {len(rows)} gates failed." if failed else f"All {len(rows)} gates passed."
    head = ["gate", "", "value", "threshold", "standard error", "sample"]
    return f'<h2>Gates</h2><p class="{"failed" if failed else ""}">{verdict}</p>{_table(head, rows)}'


def _kept(plan: FusionPlan) -> tuple[str, int, list[int], list[int]]:
    """What a plan counts, how much a side of a source layer has of it, and what layers keep of keys and of values."""
    budget, heads = plan.head_budget, plan.heads
    if plan.layout in WIDE:
        return "channels", heads.num_key_value_heads * heads.head_dim, plan.key_channels, plan.value_channels
    return "heads", heads.num_key_value_heads, list(budget.key_heads), list(budget.value_heads)


def _fused(plan: FusionPlan | None) -> str:
    if plan is None:
        return ""
    heads, (counted, most, keys, values) = plan.heads, _kept(plan)
    facts = [
        ["source", plan.source.name],
        ["layout", plan.layout], ["method", plan.method], ["allocator", plan.allocator],
        ["KV cache kept", f"{plan.kv_ratio:.4f}"],
        [f"{counted} in the cache", f"{sum(keys) + sum(values)} of {2 * heads.num_hidden_layers * most}"],
    ]  # fmt: skip
    layers = range(heads.num_hidden_layers)
    figure, axis = _axes(7.5, 3)
    width = 0.4
    for offset, counts, colour, hatch, name in (
        (-width / 2, keys, "#2b5c8a", "", f"key {counted}"),
        (width / 2, values, "#e8b04a", "///", f"value {counted}"),
    ):
        axis.bar([i + offset for i in layers], counts, width, color=colour, hatch=hatch, edgecolor="black", label=name)
    axis.axhline(most, color="black", linestyle="--", linewidth=1, label="source")
    axis.set(xlabel="layer", ylabel=counted, ylim=(0, most * 1.3))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(ncol=3, loc="upper center", frameon=False)
    rows = [
        [i, keys[i], values[i], _groups(layer.key_groups), _groups(layer.value_groups)]
        for i, layer in enumerate(plan.layers)
    ]
    table = _table(["layer", f"key {counted}", f"value {counted}", "key groups", "value groups"], rows)
    return (
        f"<h2>What was fused</h2>{_table(['', ''], facts)}"
        f"{_svg(figure, f'Key {counted} and value {counted} that each layer keeps; dashed: the source.')}"
        f"<details><summary>Groups of source heads, layer by layer</summary>{table}</details>"
    )


def _heat_maps(analysis: Path | None) -> str:
    if analysis is None:
        return ""
    figures = []
    for side in ("key", "value"):
        path = analysis / f"{side}_similarity.png"
        try:
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError:
            fix = "give the output folder of `headfuse analyze -o`"
            raise ConfigError(f"holds no {path.name}", where=analysis.name, fix=fix) from None
        caption = f"Similarity of the source's {side} heads, layer by layer: light (yellow) is alike, dark is not."
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return f"<h2>Similarity of heads</h2>{''.join(figures)}"


def _quality(document: Mapping[str, Any] | None) -> str:
    if document is None:
        return ""
    against = document["comparison"] is not None
    shown = [document["model"], *([document["baseline"]] if against else [])]
    head = ["", *(figures["name"] for figures in shown), *(["model to baseline"] if against else [])]
    rows = [[name, *cells, *([ratio] if against else [])] for name, cells, ratio in figure_rows(document)]
    text = f"<h2>Quality and memory</h2>{_table(head, rows)}<p>{_e(document['data'])}: {_e(document['protocol'])}.</p>"
    if document["memory_formula"]:
        text += f"<p>Memory: {_e(document['memory_formula'])}.</p>"
    agreement = document["agreement"]
    if agreement is None:
        return text
    for name, parts in (("domain of the text", agreement["domains"]), ("position", agreement["positions"])):
        if parts:
            figure, axes = _axes(7.5, 2.8, columns=2)
            labels = [part["part"].replace("$", r"\$") for part in parts]
            for axis, key, title in (
                (axes[0], "kl", "KL(baseline || model), nats"), (axes[1], "top1_agreement", "same most likely token")
            ):  # fmt: skip
                values = [part[key]["value"] for part in parts]
                errors = [part[key]["stderr"] or 0.0 for part in parts]
                axis.bar(labels, values, yerr=errors, color="#9db8d2", edgecolor="black", capsize=3)
                axis.set_title(title, fontsize=9)
                axis.tick_params(axis="x", rotation=40, labelsize=8)
            text += _svg(figure, f"Agreement with the baseline by {name}; bars of error are one standard error.")
    return text


def _training(path: Path) -> str:
    """The curve of the training log beside the weights; lines that are not its own are left out."""
    if not path.is_file():
        return ""
    steps, validations = list[tuple[float, float]](), list[tuple[float, float]]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            place = record.get("step")
            for key, points in (("loss", steps), ("nll", validations)):
                if isinstance(place, int | float) and isinstance(record.get(key), int | float):
                    points.append((place, record[key]))
    if not steps and not validations:
        return ""
    drawn = [(points, name, dash) for points, name, dash in (
        (steps, "training loss", "-"), (validations, "validation NLL", "--")) if points]  # fmt: skip
    figure, axes = _axes(7.5, 2.8, columns=len(drawn))
    for axis, (points, name, dash) in zip(axes if len(drawn) > 1 else [axes], drawn, strict=True):
        marker = "o" if len(points) < 40 else None
        axis.plot(*zip(*points, strict=True), dash, marker=marker, markersize=3, color="black")
        axis.set(title=name, xlabel="step")
    return f'<div class="whole"><h2>Training</h2>{_svg(figure, f"The curve of {path.name}.")}</div>'


def _commands(folder: Path, plan: FusionPlan | None, document: Mapping[str, Any] | None) -> str:
    lines = []
    if plan is not None:
        config = folder / "headfuse.yaml"
        settings = "headfuse.yaml" if config.is_file() else "plan.json"
        option = "--config" if config.is_file() else "--plan"
        lines.append(f"headfuse fuse {option} {settings} {shlex.quote(plan.source.model)}")
    if (folder / TRAIN_LOG).is_file():
        lines.append(f"# then trained: the options are in the first line of {TRAIN_LOG}")
    if document is not None:
        lines.append(eval_command(document))
    text = f"<h2>Commands</h2><pre>{_e(chr(10).join(lines))}</pre>"
    config = folder / "headfuse.yaml"
    if plan is not None and config.is_file():
        content = config.read_text(encoding="utf-8", errors="replace")
        text += f"<details open><summary>headfuse.yaml</summary><pre>{_e(content)}</pre></details>"
    return text


def eval_command(document: Mapping[str, Any]) -> str:
    """The command that measures the figures of a document again; models and texts by their names."""
    words = ["headfuse", "eval", document["model"]["name"]]
    if document["baseline"]:
        words += ["--baseline", document["baseline"]["name"]]
    words += ["--data", document["data"], "--samples", document["windows"]]
    words += ["--sequence-length", document["sequence_length"], "--stride", document["stride"]]
    if document["tasks"]:
        words += ["--tasks", ",".join(dict.fromkeys(entry["task"] for entry in document["tasks"]))]
        words += [] if document["limit"] is None else ["--limit", document["limit"]]
    words += [] if document["seed"] is None else ["--seed", document["seed"]]
    if document["passkey"]:
        words += ["--passkey-trials", document["passkey"][0]["model"]["samples"]]
        words += ["--passkey", ",".join(str(entry["length"]) for entry in document["passkey"])]
    if document["model"]["fit"]:
        words += ["--memory", document["model"]["fit"]["memory_bytes"]]
    words += ["--speed"] if document["speed"] else []
    if document["gates"]:
        words += ["--gate", ",".join(gate["gate"] for gate in document["gates"])]
    return shlex.join(str(word) for word in words)


def _e(text: object) -> str:
    return html.escape(str(text))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def _groups(groups: Sequence[Sequence[int]]) -> str:
    return " | ".join(" ".join(map(str, group)) for group in groups)


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    top = f"<tr>{''.join(f'<th>{_e(cell)}</th>' for cell in head)}</tr>" if any(head) else ""
    lines = ("".join(f"<td>{_e(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{top}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _svg(figure: Any, caption: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "headfuse"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return f"<figure>{svg}<figcaption>{_e(caption)}</figcaption></figure>"
