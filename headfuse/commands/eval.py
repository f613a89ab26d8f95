"""`headfuse eval`: NLL and perplexity by a stated protocol, KV bytes per token, parameters."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from headfuse.gates import judge, read_gates


def run(
    *,
    model: str,
    data: str = "default",
    baseline: str | None = None,
    gate: str | None = None,
    verify: bool = False,
    samples: int = 24,
    sequence_length: int = 512,
    seed: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    json_output: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Evaluate, with a spinner where stderr is a terminal; returns the document that `--json` prints."""
    from headfuse import checkpoint
    from headfuse.evaluate import evaluate

    gates = read_gates(gate) if gate else []
    if verify:
        checkpoint.verify(checkpoint.resolve_model(model))
    console = Console(stderr=True, quiet=quiet or json_output or verbose)
    with console.status("evaluating"):
        result = evaluate(
            model,
            data=data,
            baseline=baseline,
            samples=samples,
            sequence_length=sequence_length,
            device=device,
            dtype=dtype,
            threads=threads,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
    kv_ratio = result.comparison.kv_ratio if result.comparison else None
    document = {"schema_version": 1, "command": "eval", "kv_ratio": kv_ratio, "verified": verify, **result.to_dict()}
    document["gates"] = [judged.to_dict() for judged in judge(gates, document)]
    return document


def render(document: dict[str, Any], console: Console) -> None:
    """Print the table and the protocol."""
    model, baseline, comparison = document["model"], document["baseline"], document["comparison"]
    shown = [model] if baseline is None else [model, baseline]
    table = Table()
    table.add_column("")
    for figures in shown:
        table.add_column(figures["name"], justify="right")
    if comparison is not None:
        table.add_column("model to baseline", justify="right")
    rows = [
        ("NLL per token", [_with_error(figures["nll"], figures["nll_stderr"]) for figures in shown]),
        ("perplexity", [_number(figures["perplexity"]) for figures in shown]),
        ("KV bytes per token", [f"{figures['kv_bytes_per_token']:,}" for figures in shown]),
        ("KV cache dtype", [figures["kv_dtype"] for figures in shown]),
        ("parameters", [f"{figures['parameters']:,}" for figures in shown]),
    ]
    ratios = [""] * len(rows)
    if comparison is not None:
        ratios[0] = _with_error(comparison["nll_gap"], comparison["nll_gap_stderr"], sign="+")
        ratios[1] = f"x {_number(comparison['ppl_ratio'])}"
        ratios[2] = f"x {comparison['kv_ratio']:.4g}"
        ratios[4] = f"x {model['parameters'] / baseline['parameters']:.4g}"
    for (name, cells), ratio in zip(rows, ratios, strict=True):
        table.add_row(name, *cells, *([ratio] if comparison is not None else []))
    console.print(table)
    console.print(f"{document['data']}: {document['protocol']}.", highlight=False, soft_wrap=True)
    for judged in document["gates"]:
        value = "no such figure here" if judged["value"] is None else _with_error(judged["value"], judged["stderr"])
        threshold = "none" if judged["threshold"] is None else f"{judged['threshold']:.6g}"
        verdict = "passed" if judged["passed"] else "FAILED"
        line = f"gate {judged['gate']}: {verdict}, {value} against {threshold}, {judged['windows']} windows"
        console.print(line, highlight=False, soft_wrap=True)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _number(value: float | None) -> str:
    return "beyond 1e304" if value is None else f"{value:.4g}"
