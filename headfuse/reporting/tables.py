"""Formats the figures of `headfuse eval` for the terminal and the report. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headfuse.choices import WIDE

if TYPE_CHECKING:
    from headfuse.plan import FusionPlan


def figure_rows(document: Mapping[str, Any]) -> list[tuple[str, list[str], str]]:
    """Rows of figures: the name, a cell for the model, one for the baseline, and their comparison."""
    model, baseline, comparison = document["model"], document["baseline"], document["comparison"]
    shown = [model] if baseline is None else [model, baseline]
    against = comparison is not None
    rows = [
        (
            "NLL per token",
            [_with_error(figures["nll"], figures["nll_stderr"]) for figures in shown],
            _with_error(comparison["nll_gap"], comparison["nll_gap_stderr"], sign="+") if against else "",
        ),
        (
            "perplexity",
            [_number(figures["perplexity"]) for figures in shown],
            f"x {_number(comparison['ppl_ratio'])}" if against else "",
        ),
        (
            "KV bytes per token",
            [f"{figures['kv_bytes_per_token']:,}" for figures in shown],
            f"x {comparison['kv_ratio']:.4g}" if against else "",
        ),
        ("KV cache dtype", [figures["kv_dtype"] for figures in shown], ""),
        (
            "parameters",
            [f"{figures['parameters']:,}" for figures in shown],
            f"x {model['parameters'] / baseline['parameters']:.4g}" if against else "",
        ),
    ]
    if model["fit"]:
        room, context = f"in {model['fit']['memory_bytes'] / 1e9:.4g} GB", model["fit"]["context"]
        names = {"longest_context": "longest context", "largest_batch": f"largest batch of {context} tokens"}
        for key, name in names.items():
            fits = [figures["fit"][key] for figures in shown]
            ratio = f"x {fits[0] / fits[1]:.4g}" if against and fits[1] else ""
            rows.append((f"{name} {room}", [f"{value:,}" for value in fits], ratio))
    if document["speed"]:
        speed = document["speed"]
        name = f"decoded tokens/s after {speed['context']}, median of {speed['rounds']}"
        rows.append((name, [f"{speed['model']:.4g}", f"{speed['baseline']:.4g}"], f"x {speed['ratio']:.4g}"))
    mean = document.get("tasks_mean")
    means = [(f"mean accuracy, {mean['tasks']} tasks", mean)] if mean else []
    tasks = [(f"{e['task']} {e['metric']}, {e['model']['samples']} questions", e) for e in document["tasks"]]
    passkeys = [(f"passkey at {e['length']}, {e['model']['samples']} prompts", e) for e in document["passkey"]]
    ruler = [(f"{e['task']} at {e['length']}, {e['model']['samples']} prompts", e) for e in document.get("ruler", [])]
    for name, entry in means + tasks + passkeys + ruler:
        cells = [shown_estimate(entry["model"])] + ([shown_estimate(entry["baseline"])] if against else [])
        rows.append((name, cells, shown_estimate(entry["difference"], "+") if against else ""))
    for entry in document["passkey"]:
        cells = [shown_estimate(entry["model_nll"])] + ([shown_estimate(entry["baseline_nll"])] if against else [])
        rows.append((f"NLL of the key at {entry['length']}", cells, ""))
    return rows


def protocol(document: Mapping[str, Any]) -> str:
    """On what text the NLL was measured, and how."""
    text = "the bundled prose and code" if document["data"] == "default" else document["data"]
    return f"Text: {text}. {document['protocol']}."


def gate_rows(gates: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Gate, verdict, value, threshold, standard error and sample of each gate."""
    return [
        [
            gate["gate"],
            "passed" if gate["passed"] else "FAILED",
            *(_figure(gate[name]) for name in ("value", "threshold", "stderr")),
            f"{gate['samples']} {gate['unit']}" if gate["samples"] else "",
        ]
        for gate in gates
    ]


def shown_estimate(estimate: dict[str, Any], sign: str = "") -> str:
    """A mean with its standard error."""
    return _with_error(estimate["value"], estimate["stderr"], sign)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _number(value: float | None) -> str:
    return "beyond 1e304" if value is None else f"{value:.4g}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def kept(plan: FusionPlan) -> tuple[str, int, list[int], list[int]]:
    """The unit that a plan counts, its number per side of a source layer, and what each layer keeps of keys and
    values.
    """
    budget, heads = plan.head_budget, plan.heads
    if plan.layout in WIDE:
        return "channels", heads.num_key_value_heads * heads.head_dim, plan.key_channels, plan.value_channels
    return "heads", heads.num_key_value_heads, list(budget.key_heads), list(budget.value_heads)
