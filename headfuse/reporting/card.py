"""Model cards: README.md of fused, trained and exported models."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from headfuse.checkpoint.hub import repository_of
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS, loads_in
from headfuse.reporting.tables import kept
from headfuse.reporting.templating import render

if TYPE_CHECKING:
    from headfuse.conversion.export_plan import ExportPlan
    from headfuse.conversion.result import FuseResult
    from headfuse.models.source import Source
    from headfuse.training.uptrain import UptrainResult

logger = logging.getLogger(__name__)
CARD = "README.md"
SOURCE_CARD = "README-source.md"
"""The source's card, if it contains the licence."""
INHERITED = ("language", "pipeline_tag", "library_name", "datasets")
"""Metadata that holds for the fused model as for its source, besides licence, gate and tags; figures do not."""
TAGS = ("headfuse", "kv-cache")


def fused_card(source: Source, result: FuseResult) -> str:
    """README.md of the output: what was fused, figures before and after, and how to load it."""
    plan = result.plan
    body = render(
        "fused_card.jinja",
        source=source.name,
        plan=plan,
        trained=FUSION_METHODS[plan.method].trained,
        result=result,
        stages=[stage for stage in result.stages if stage.kept and stage.nll is not None],
        kept=kept(plan),
        runtimes=loads_in(plan),
    )
    repository = repository_of(source.folder)
    return _front_matter(_inherited(source.folder), None if repository is None else repository.name) + body


def keep_licence_text(source: Path, target: Path) -> None:
    """Copy the source's card to where the output's `license_link` leads, if its own leads to the card."""
    if _inherited(source).get("license_link") == SOURCE_CARD:
        shutil.copyfile(source / CARD, target / SOURCE_CARD)


def extended_card(folder: Path, name: str, section: str) -> str:
    """The card of a folder with one more section; a missing front matter or title is added.

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
    """The metadata of a source's card that holds for models made from it, with headfuse's tags added."""
    found = _metadata(folder)
    kept = {
        key: value
        for key, value in found.items()
        if key in INHERITED or str(key).startswith(("license", "extra_gated_"))
    }
    if str(kept.get("license_link")).removeprefix("./") == CARD:
        kept["license_link"] = SOURCE_CARD
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
        logger.warning(
            "%s: its front matter cannot be read and is left out: %s", path, " ".join(str(error).split())[:200]
        )
        return {}


def _as_list(value: Any) -> list[Any]:
    """A value that the hub accepts alone or as a list, as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def uptrained_section(result: UptrainResult) -> str:
    """What the model card says about the training."""
    recipe, teacher = result.recipe, f" from `{result.teacher}`" if result.teacher else ""
    figures = {"source": result.nll_teacher, "before": result.nll_before, "after": result.nll_after}
    return render(
        "uptrained_section.jinja",
        result=result,
        recipe=recipe,
        loss={"kl": f"forward KL divergence{teacher} over the full vocabulary", "ce": "cross-entropy"}[recipe.loss],
        trained={
            "all": "All weights were",
            "attention": "The attention weights were",
            "lora": f"Adapters of rank {recipe.lora_rank} on the attention weights, merged into them, were",
        }[recipe.train],
        batch_size=(recipe.batch_size or 0) * recipe.gradient_accumulation * result.processes,
        figures={name: nll for name, nll in figures.items() if nll is not None},
    )


def exported_section(plan: ExportPlan) -> str:
    """What the model card says about an export."""
    return render(
        "exported_section.jinja",
        target=plan.target,
        architecture=plan.architecture,
        num_key_value_heads=plan.num_key_value_heads,
        kv_bytes=plan.kv_bytes,
        runtimes=LAYOUTS[plan.target].runtimes,
    )
