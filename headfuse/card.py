"""The model card of a fused checkpoint."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from headfuse.layouts import LAYOUTS

if TYPE_CHECKING:
    from headfuse.convert import FuseResult
    from headfuse.source import Source


def fused_card(source: Source, result: FuseResult) -> str:
    """README.md of the output: what was fused, figures before and after, and how to load it."""
    plan, budget = result.plan, result.plan.head_budget
    rows = [f"| {i} | {k} | {v} |" for i, (k, v) in enumerate(zip(budget.key_heads, budget.value_heads, strict=True))]
    lines = [
        "---", f"base_model: {source.name}", *_licence(source), "tags: [headfuse, kv-cache]", "---", "",
        f"# {source.name}, {plan.kv_ratio:.4g} of its KV cache", "",
        f"Made from `{source.name}` with headfuse {plan.headfuse_version}: its key heads and value heads were fused "
        f"(method `{plan.method}`, allocator `{plan.allocator}`, layout `{plan.layout}`); "
        + ("all weights were trained." if plan.method == "dha" else "only the attention projections changed."),
        "", "| | source | fused |", "|---|---|---|",
        f"| KV bytes per token | {result.kv_bytes_before} | {result.kv_bytes_after} |",
    ]  # fmt: skip
    if result.nll_before is not None and result.nll_after is not None:
        lines += [
            f"| NLL per token, held-out calibration text | {result.nll_before:.4f} | {result.nll_after:.4f} |",
            f"| perplexity | {_perplexity(result.nll_before)} | {_perplexity(result.nll_after)} |",
        ]
    stages = [f"{stage.name} {stage.nll:.4f}" for stage in result.stages if stage.kept and stage.nll is not None]
    lines += ["", f"NLL after each stage of the conversion: {', '.join(stages)}."] if len(stages) > 1 else []
    lines += [
        "",
        f"Loads in: {LAYOUTS[plan.layout].runtimes}.",
        "",
        "| layer | key heads | value heads |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _perplexity(nll: float) -> str:
    """The figure, unless it is so large that it says nothing, or is beyond a float."""
    return f"{math.exp(nll):.2f}" if nll < 20 else "above 10^8"


def _licence(source: Source) -> list[str]:
    """The licence lines of the source card's front matter."""
    card = source.folder / "README.md"
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return []
    return [line for line in text.split("---", 2)[1].splitlines() if line.startswith("license")]
