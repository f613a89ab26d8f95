"""report.html: what was fused, what it cost and what it saves, in one self-contained file."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headfuse.checkpoint.companions import FUSE_OPTIONS, TRAIN_LOG
from headfuse.checkpoint.disk import write_whole
from headfuse.checkpoint.plan_file import plan_in
from headfuse.errors import CheckpointError, ConfigError, OutputError
from headfuse.plan import FusionPlan
from headfuse.reporting.charts import agreement_chart, heads_chart, training_chart
from headfuse.reporting.tables import figure_rows, gate_rows, kept, protocol
from headfuse.reporting.templating import render


def write_report(
    path: Path,
    folder: Path,
    document: Mapping[str, Any] | None = None,
    analysis: Path | None = None,
    name: str | None = None,
) -> None:
    """Write the report of a model folder.

    Args:
        path: the HTML file; it appears whole.
        folder: the model; plan.json and the training log are read where it has them.
        document: that of `headfuse eval --json`, for the figures.
        analysis: the output folder of `headfuse analyze`, for the heat maps.
        name: what the title names; by default the model of the document, or the folder.

    Raises:
        HeadfuseError: for a folder of which there is nothing to report, and files that cannot be read.
    """
    plan = plan_in(folder)
    if plan is None and document is None:
        raise CheckpointError("holds no plan.json", where=folder, fix="give a folder that `headfuse fuse` wrote")
    options = folder / FUSE_OPTIONS
    page = render(
        "report.html.jinja",
        name=name or (document["model"]["name"] if document else folder.resolve().name),
        plan=plan,
        document=document,
        heat_maps={} if analysis is None else _heat_maps(analysis),
        training=training_chart(folder / TRAIN_LOG),
        commands=_commands(folder, plan, document),
        options=options.read_text(encoding="utf-8", errors="replace") if plan and options.is_file() else None,
        gate_rows=gate_rows,
        group_rows=_group_rows,
        kept=kept,
        quality_rows=_quality_rows,
        protocol=protocol,
        heads_chart=heads_chart,
        agreement_chart=agreement_chart,
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
        raise ConfigError("does not hold the results of `headfuse eval --json`", where=path.name, fix=fix)
    return document


def _group_rows(plan: FusionPlan) -> list[list[object]]:
    """Counts and groups of source heads, layer by layer."""
    _, _, keys, values = kept(plan)
    return [
        [i, keys[i], values[i], _groups(layer.key_groups), _groups(layer.value_groups)]
        for i, layer in enumerate(plan.layers)
    ]


def _groups(groups: Sequence[Sequence[int]]) -> str:
    return " | ".join(" ".join(map(str, group)) for group in groups)


def _quality_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """The figures of the model, of its baseline, and their comparison where there is one."""
    against = document["comparison"] is not None
    return [[name, *cells, *([ratio] if against else [])] for name, cells, ratio in figure_rows(document)]


def _heat_maps(analysis: Path) -> dict[str, str]:
    """The heat maps of an analysis in Base64, by side.

    Raises:
        ConfigError: where the folder does not hold them.
    """
    images = {}
    for side in ("key", "value"):
        path = analysis / f"{side}_similarity.png"
        try:
            images[side] = base64.b64encode(path.read_bytes()).decode()
        except OSError:
            fix = "give the output folder of `headfuse analyze -o`"
            raise ConfigError(f"holds no {path.name}", where=analysis.name, fix=fix) from None
    return images


def _commands(folder: Path, plan: FusionPlan | None, document: Mapping[str, Any] | None) -> list[str]:
    """The commands that made the model and its figures."""
    lines = []
    if plan is not None:
        options = folder / FUSE_OPTIONS
        settings = "--plan plan.json"
        if options.is_file():
            reviewed = settings in options.read_text(encoding="utf-8").partition("\n")[0]
            settings = f"--config {FUSE_OPTIONS}" + f" {settings}" * reviewed
        lines.append(f"headfuse fuse {settings} {shlex.quote(plan.source.model)}")
    if (folder / TRAIN_LOG).is_file():
        lines.append(f"# then trained: the options are in the first line of {TRAIN_LOG}")
    if document is not None:
        lines.append(eval_command(document))
    return lines


def eval_command(document: Mapping[str, Any]) -> str:
    """The command that measures the figures of a document again; models and texts by their names."""
    words = ["headfuse", "eval", document["model"]["name"]]
    if document["baseline"]:
        words += ["--baseline", document["baseline"]["name"]]
    words += ["--data", document["data"], "--samples", document["windows"]]
    words += ["--sequence-length", document["sequence_length"], "--stride", document["stride"]]
    if document["tasks"]:
        words += ["--tasks", ",".join(dict.fromkeys(entry["task"] for entry in document["tasks"]))]
        words += [word for folder in document.get("tasks_path", []) for word in ("--tasks-path", folder)]
        words += [] if document["limit"] is None else ["--limit", document["limit"]]
    words += [] if document["seed"] is None else ["--seed", document["seed"]]
    if document["passkey"]:
        words += ["--passkey-trials", document["passkey"][0]["model"]["samples"]]
        words += ["--passkey", ",".join(str(entry["length"]) for entry in document["passkey"])]
    if document.get("ruler"):
        words += ["--ruler-trials", document["ruler"][0]["model"]["samples"]]
        for option, key in (("--ruler", "length"), ("--ruler-tasks", "task")):
            words += [option, ",".join(dict.fromkeys(str(entry[key]) for entry in document["ruler"]))]
    words += ["--cache-dtype", document["cache_dtype"]] if document.get("cache_dtype") else []
    if document["model"]["fit"]:
        words += ["--memory", document["model"]["fit"]["memory_bytes"]]
    words += ["--speed"] if document["speed"] else []
    words += ["--dtype", document["dtype"]] if document.get("dtype") else []
    if document["gates"]:
        words += ["--gate", ",".join(gate["gate"] for gate in document["gates"])]
    return shlex.join(str(word) for word in words)
