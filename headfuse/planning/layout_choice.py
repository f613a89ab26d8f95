"""Which layout a model gets, and every check of it that needs no weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from headfuse.choices import DEFAULT_LAYOUTS, LAYOUT_FOR, ONE_HEAD, Layout, Runtime
from headfuse.config.fuse import FuseConfig
from headfuse.errors import ConfigError, HeadfuseError, UnsupportedModelError
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS, slot_table
from headfuse.layouts.served import check_served
from headfuse.modeling.configuration_headfuse import one_head_width
from headfuse.models.heads import head_layout
from headfuse.models.source import Source
from headfuse.planning.allocators import ALLOCATORS
from headfuse.planning.planner import plan_options
from headfuse.planning.widths import least_width

logger = logging.getLogger(__name__)


def with_layout(config: FuseConfig, model: Any, runtime: Runtime | None = None) -> tuple[FuseConfig, str | None]:
    """The options with the layout that they name, or with the first that goes with the model and the other options.

    Args:
        config: the options.
        model: the config of the source.
        runtime: what has to load the layout; the budget then counts what it caches.

    Returns:
        The options, and why they got this layout: None where they name it, or where it is the default.

    Raises:
        HeadfuseError: where no layout goes with them, with the reasons.
    """
    named, refusals = "layout" in config.model_fields_set, dict[Layout, HeadfuseError]()
    layouts = (config.layout,) if named else DEFAULT_LAYOUTS if runtime is None else LAYOUT_FOR[runtime]
    for layout in layouts:
        chosen = _counted(config.model_copy(update={"layout": layout}), runtime, model)
        refusal = _refusal(chosen, model, runtime)
        if refusal is None:
            return chosen, None if named else _why(layout, runtime, refusals)
        refusals[layout] = refusal
    last = refusals[layouts[-1]]
    if len({error.what for error in refusals.values()}) == 1:
        raise last
    where, other = ("--layout", "") if runtime is None else ("--for", "choose another runtime, or ")
    raise type(last)(
        f"no layout fits: {_reasons(refusals)}", where=where, fix=f"{other}change an option that is named there"
    )


def _refusal(config: FuseConfig, model: Any, runtime: Runtime | None) -> HeadfuseError | None:
    """Why a layout does not go with the model or the other options; None where it does."""
    try:
        check_fits(config, model)
        if runtime is not None:
            check_served(model, runtime, config)
    except HeadfuseError as error:
        return error
    return None


def _why(layout: Layout, runtime: Runtime | None, refusals: Mapping[Layout, HeadfuseError]) -> str | None:
    """Why the options got a layout that they do not name; None for the default."""
    words = list[str]()
    if runtime is not None:
        words.append(f"the first that fits of those for {runtime} ({', '.join(LAYOUT_FOR[runtime])})")
    if refusals:
        words.append(f"not {_reasons(refusals)}")
    if runtime is not None and layout in ONE_HEAD.get(runtime, ()):
        words.append("for tensor parallelism, or the runtime's own model class, give --layout gqa")
    return "; ".join(words) or None


def _reasons(refusals: Mapping[Layout, HeadfuseError]) -> str:
    """Layouts with the reason in brackets, each reason once."""
    reasons = dict[str, list[str]]()
    for layout, error in refusals.items():
        place = "" if error.where in (None, "--layout", "--for") else f"{error.where}: "
        reason = place + error.what.removeprefix(f"layout {layout} does not fit: ")
        reasons.setdefault(reason, []).append(layout)
    return "; ".join(f"{', '.join(layouts)} ({reason})" for reason, layouts in reasons.items())


def _counted(config: FuseConfig, runtime: Runtime | None, model: Any) -> FuseConfig:
    """The options with a budget that counts what a runtime caches.

    If it caches one head per layer with key and value equally wide, a layer's keys and values get equal shares. A
    wide head then has at least as many channels as that head, if the budget buys them.
    """
    one_head = runtime is not None and config.layout in ONE_HEAD.get(runtime, ())
    if not one_head or config.budget.shares is None:  # or counts, one by one
        return config
    budget: dict[str, Any] = {"layerwise": True}
    shares, least = config.budget.shares, one_head_width(0, 0)
    if LAYOUTS[config.layout].wide and not isinstance(shares, tuple) and not config.budget.keep_layers:
        heads = head_layout(model, "config.json")
        if shares * heads.num_key_value_heads * heads.head_dim >= least:
            budget["min_channels"] = max(least_width(config.budget.min_channels, shares, heads), least)
    return config.model_copy(update={"budget": config.budget.model_copy(update=budget)})


def check_fits(config: FuseConfig, model: Any) -> None:
    """Check that the layout can hold the model, and that the other options go with it.

    Raises:
        UnsupportedModelError: when the layout cannot hold this model.
        ConfigError: for an option that the layout does not go with.
    """
    LAYOUTS[config.layout].check(model)
    rules = plan_options(config).rules
    if config.budget.cross_layer and not LAYOUTS[config.layout].wide:
        raise ConfigError(
            f"layout {config.layout} has no layers that read another one's cache", where="--cross-layer",
            fix="add --layout latent, or leave --cross-layer out",
        )  # fmt: skip
    if config.max_positions is not None:
        _check_positions(config, config.max_positions, model)
    if LAYOUTS[config.layout].wide or rules.head_dim is not None:
        _check_wide(config)


def _check_positions(config: FuseConfig, positions: int, model: Any) -> None:
    """Refuse a number of positions that the layout makes no use of, or that the text or the model does not fit."""
    own, where = getattr(model, "max_position_embeddings", None), "--max-positions"
    if not LAYOUTS[config.layout].wide:
        raise ConfigError(
            f"layout {config.layout} turns every rotary plane, for texts of any length", where=where,
            fix="leave it out, or add --layout latent",
        )  # fmt: skip
    if own is None or positions > own:
        raise ConfigError(
            f"the model has {own or 'no limit of'} positions", where=where, fix="leave it out, or lower it"
        )
    if config.calibration.sequence_length > positions:
        raise ConfigError(
            f"{config.calibration.sequence_length} is longer than the fused model's {positions} positions",
            where="--sequence-length", fix=f"choose {positions} or less",
        )  # fmt: skip


def _check_wide(config: FuseConfig) -> None:
    """Refuse a method that makes heads of the source's width, and what scores or groups single heads."""
    methods = [name for name, method in FUSION_METHODS.items() if method.wide]
    if config.method not in methods:
        raise ConfigError(
            f"method {config.method} makes no wide heads", where="--method",
            fix=f"use {', '.join(methods)}, or layout decoupled",
        )  # fmt: skip
    if not LAYOUTS[config.layout].wide:
        return
    if ALLOCATORS[config.budget.allocator].costs == "importance":
        raise ConfigError(
            f"allocator {config.budget.allocator} scores single heads, and layout latent has one wide head",
            where="--allocator", fix="use sensitivity, or layout decoupled",
        )  # fmt: skip
    if config.grouping != FuseConfig.model_fields["grouping"].default:
        raise ConfigError(
            f"grouping {config.grouping} chooses groups of heads, and layout latent has one group in every layer",
            where="--grouping", fix="leave it out, or use layout decoupled",
        )  # fmt: skip


def with_possible_width(config: FuseConfig, source: Source) -> FuseConfig:
    """`--head-dim auto` becomes the source's width where the model's class has no other, or the budget buys just that.

    Heads of that width in one table of every frequency are the stock layout's, which has its own rate of refinement.
    """
    if config.budget.head_dim != "auto" or not LAYOUTS[config.layout].one_width:
        return config
    try:
        slot_table.check(source.config)
    except UnsupportedModelError as reason:
        logger.info("--head-dim auto keeps the source's %d channels: %s", source.heads.head_dim, reason.what)
        own = source.heads.head_dim
    else:
        own = plan_options(config).rules.one_width(source.heads)[1]
    if own != source.heads.head_dim:
        return config
    return config.model_copy(update={"budget": config.budget.model_copy(update={"head_dim": None})})


def check_budget(config: FuseConfig, source: Source) -> int:
    """Check that the budget can be met, before any heavy work; return the channels of the cache that it keeps.

    The layout fits the model and the options: `with_layout` chose it.

    Raises:
        UnsupportedModelError: when the model's class has no heads of another width.
        BudgetError: saying which budget works.
    """
    rules = plan_options(config).rules
    if rules.head_dim is not None:
        slot_table.check(source.config)
    return rules.allocate("uniform", source.heads).total * rules.channels(source.heads)
