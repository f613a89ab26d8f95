"""What `--for RUNTIME` does: a layout that the runtime loads, and a budget that counts what it caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headfuse import choices
from headfuse.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from headfuse.config.fuse import FuseConfig


def settings_for(
    runtime: choices.Runtime | None,
    settings: FuseConfig,
    model: str,
    trust_remote_code: bool = False,
    plan: Path | None = None,
) -> tuple[FuseConfig, str | None]:
    """The options with a layout and a budget for a runtime, and why they got this layout.

    If it caches one head per layer with key and value equally wide, a layer's keys and values get equal shares.

    Args:
        runtime: of `--for`; None: the layout of the options or of the plan, or the default.
        settings: the options as they were given.
        model: folder or hub id.
        trust_remote_code: allow the model's own code.
        plan: a reviewed plan, which names a layout.

    Raises:
        ConfigError: where the runtime does not load the layout, or no layout goes with the options.
        UnsupportedModelError: for a family that the runtime does not run in this layout.
        CheckpointError: for a model that cannot be read.
    """
    from headfuse.checkpoint.folder import resolve_model
    from headfuse.checkpoint.plan_file import read_plan
    from headfuse.models.config import read_config
    from headfuse.models.heads import head_layout
    from headfuse.planning.layout_choice import with_layout

    named = "layout" in settings.model_fields_set
    if runtime is None and (named or plan is not None):
        return settings, None
    if plan is not None and not named:
        settings = settings.model_copy(update={"layout": read_plan(plan).layout})
        check_loads(runtime, settings)
    folder = resolve_model(model)
    source = read_config(folder, trust_remote_code)
    head_layout(source, folder / "config.json")  # a model without any layout says so first
    chosen, why = with_layout(settings, source, runtime)
    return chosen if plan is None else chosen.model_copy(update={"budget": settings.budget}), why  # the plan has one


def check_loads(runtime: choices.Runtime | None, settings: FuseConfig) -> None:
    """Refuse a layout, or layers that read others, which the runtime does not load; reads nothing of the model.

    Raises:
        ConfigError: for such a layout.
        UnsupportedModelError: for such layers.
    """
    if runtime is None:
        return
    loads = choices.LAYOUT_FOR[runtime]
    if "layout" in settings.model_fields_set and settings.layout not in loads:
        raise ConfigError(
            f"{runtime} does not load layout {settings.layout}", where="--for", fix=f"it loads {', '.join(loads)}"
        )
    if settings.budget.cross_layer and runtime != "transformers":
        raise UnsupportedModelError(
            f"{runtime} gives no layer the cache of another one", where="--cross-layer",
            fix="leave one of --cross-layer and --for out",
        )  # fmt: skip
