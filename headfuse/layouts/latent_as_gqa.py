"""Converts layout latent to layout gqa exactly, if all heads have one width and one slot table."""

from __future__ import annotations

from pydantic import ValidationError

from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.layouts import slot_table
from headfuse.layouts.folder import ModelFolder, wide_heads
from headfuse.plan import FusionPlan


def as_gqa(folder: ModelFolder) -> FusionPlan:
    """The plan of the stock model that computes what a folder of layout latent does.

    Raises:
        UnsupportedModelError: where its heads differ in width or in rotary slots, and for a family whose stock class
            has one width of heads.
        CheckpointError: for a folder without its plan.
    """
    if folder.plan is None:
        raise CheckpointError("there is no plan.json", where=folder.path, fix="restore the one that headfuse wrote")
    if not all(layer.wide for layer in folder.plan.layers):
        raise wide_heads(folder.path)
    try:
        plan = FusionPlan.model_validate({**folder.plan.model_dump(), "layout": "gqa"})
    except ValidationError:
        raise wide_heads(folder.path) from None
    try:
        slot_table.check(folder.family_config)
    except UnsupportedModelError as reason:
        raise UnsupportedModelError(
            f"its key heads and value heads are wide (layout latent), and {reason.what}",
            where=folder.path,
            fix="fuse the source with --layout gqa, without --head-dim",
        ) from None
    return plan.model_copy(update={"files": {}, "seal": None})
