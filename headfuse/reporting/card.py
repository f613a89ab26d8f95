"""Model cards."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from headfuse.checkpoint.hub import repository_of
from headfuse.layouts import LAYOUTS

if TYPE_CHECKING:
    from headfuse.conversion.result import FuseResult
    from headfuse.models.source import Source
    from headfuse.training.uptrain import UptrainResult

logger = logging.getLogger(__name__)
CARD = "README.md"
INHERITED = ("language", "pipeline_tag", "library_name", "datasets")
"""What is as true of the fused model as of its source, besides licence, gate and tags; figures are not."""
TAGS = ("headfuse", "kv-cache")


def fused_card(source: Source, result: FuseResult) -> str:
    """README.md of the output: what was fused, figures before and after, and how to load it."""
    plan, budget = result.plan, result.plan.head_budget
    counted, counts = "heads", (budget.key_heads, budget.value_heads)
    if LAYOUTS[plan.layout].wide:
        counted, counts = "channels", (tuple(plan.key_channels), tuple(plan.value_channels))
    rows = [f"| {i} | {k} | {v} |" for i, (k, v) in enumerate(zip(*counts, strict=True))]
    revision = f" at revision `{plan.source.revision}`" if plan.source.revision else ""
    lines = [
        f"# {source.name}, {plan.kv_ratio:.4g} of its KV cache", "",
        f"Made from `{source.name}`{revision} with headfuse {plan.headfuse_version}: its key heads and value heads "
        f"were fused (method `{plan.method}`, allocator `{plan.allocator}`, layout `{plan.layout}`); "
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
        f"| layer | key {counted} | value {counted} |",
        "|---|---|---|",
        *rows,
    ]
    repository = repository_of(source.folder)
    data = _inherited(source.folder)
    return _front_matter(data, None if repository is None else repository.name) + "\n".join(lines) + "\n"


def extended_card(folder: Path, name: str, section: str) -> str:
    """The card of a folder with one more section; with a front matter and a title where it has none.

    Args:
        folder: the model that was read.
        name: of the output, for the title of a new card.
        section: Markdown.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    block = REGEX_YAML_BLOCK.match(text)
    if block is None or not _metadata(folder):
        data, body = _inherited(folder), text[block.end() if block else 0 :].strip() or f"# {name}"
        text = _front_matter(data) + body
    return f"{text.rstrip()}\n\n{section}"


def _front_matter(data: dict[str, Any], base_model: str | None = None) -> str:
    """The YAML block that begins a card."""
    return f"---\n{ModelCardData(base_model=base_model, **data).to_yaml()}\n---\n\n"


def _inherited(folder: Path) -> dict[str, Any]:
    """The metadata of a source's card that holds for what is made from it, with tags of headfuse's own."""
    found = _metadata(folder)
    kept = {
        key: value
        for key, value in found.items()
        if key in INHERITED or str(key).startswith(("license", "extra_gated_"))
    }
    tags = _as_list(found.get("tags"))
    if "language" in kept:  # YAML 1.1 takes Norwegian's `no` for a truth value, the hub does not
        kept["language"] = ["no" if code is False else code for code in _as_list(kept["language"])]
    return {**kept, "tags": [*(str(tag) for tag in tags), *TAGS]}


def _metadata(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's card; empty, with a warning, where it cannot be read."""
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        logger.warning("%s: its front matter is left out: %s", path, " ".join(str(error).split())[:200])
        return {}


def _as_list(value: Any) -> list[Any]:
    """What the hub takes alone or as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _perplexity(nll: float) -> str:
    """The figure, unless it is so large that it says nothing, or is beyond a float."""
    return f"{math.exp(nll):.2f}" if nll < 20 else "above 10^8"


def card_section(result: UptrainResult) -> str:
    """What the model card says about the training."""
    recipe, teacher = result.recipe, f" from `{result.teacher}`" if result.teacher else ""
    terms = {"kl": f"forward KL divergence{teacher} over the full vocabulary", "ce": "cross-entropy"}[recipe.loss]
    terms += f" plus {recipe.cross_entropy:g} times cross-entropy" if recipe.cross_entropy else ""
    terms += f" plus {recipe.hidden:g} times the relative error of every layer's output" if recipe.hidden else ""
    terms += f", the first {recipe.layerwise:.0%} of the steps layer by layer" if recipe.layerwise else ""
    trained = {
        "all": "All weights were", "attention": "The attention weights were",
        "lora": f"Adapters of rank {recipe.lora_rank} on the attention weights, merged into them, were",
    }[recipe.train]  # fmt: skip
    windows = f"{result.validation_windows} windows of {recipe.sequence_length} tokens of " + (
        f"`{recipe.named()['validation_data']}`" if recipe.validation_data else "the text, held out"
    )
    figures = {"source": result.nll_teacher, "before": result.nll_before, "after": result.nll_after}
    rows = "".join(f"| {name} | {nll:.3f} |\n" for name, nll in figures.items() if nll is not None)
    batch = (recipe.batch_size or 0) * recipe.gradient_accumulation * result.processes
    best = f" (the weights are those after step {result.best_step})" if result.best_step != result.steps else ""
    return (
        "## Uptraining\n\n"
        f"{trained} trained in float32 on {result.tokens:,} tokens of `{result.data}` by `headfuse uptrain`:"
        f" {terms}, AdamW (betas 0.9 and 0.95, weight decay {recipe.weight_decay:g}), {result.steps}"
        f" steps{best} of {batch} x {recipe.sequence_length} tokens, peak learning"
        f" rate {recipe.learning_rate:g} ({recipe.fused_learning_rate:g} times that for key and value projections),"
        f" {recipe.warmup:.0%} warm-up, cosine to {recipe.final_learning_rate:.0%},"
        f" gradient norm at most {recipe.gradient_clip:g}, seed {recipe.seed}.\n"
        + (f"\nNLL per token on {windows}:\n\n| model | NLL |\n|---|---|\n{rows}" if rows else "")
    )
