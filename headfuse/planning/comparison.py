"""Which of several plans loses least, on calibration text that none was made from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from headfuse.estimates import Estimate, mean
from headfuse.fusion.moments import key_moments, value_moments
from headfuse.fusion.refit import refit_output
from headfuse.models.placement import factories_on
from headfuse.models.source_layer import SourceLayer
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan, LayerPlan
from headfuse.planning.end_loss_probes import window_divergences
from headfuse.planning.fused_variants import Variant, captures_for_refit, with_heads
from headfuse.planning.wide_survey import WideBases
from headfuse.text.calibration import START_WEIGHT, CalibrationText

logger = logging.getLogger(__name__)

COMPARED_WINDOWS = 4
"""Windows that plans are compared on, whole: halves repeat too little (docs/experiments/errors-that-look-small.md)."""
FITTED_WINDOWS = 8
"""Most windows that layers are fitted to for it; all plans are fitted to the same."""
CERTAIN = 2.0
"""Standard errors of the mean log ratio from which on a plan is taken to lose less."""
LEAST_LOSS = 1e-9
"""What a window loses at least, in nats per token: rounding makes a divergence of nothing negative."""
NEGLIGIBLE = 1e-7
"""Where allocated widths are expected to lose less than this, in nats per token, nothing is compared. A gain that costs
only predict is no reason to leave the comparison out (docs/experiments/errors-that-look-small.md).
"""
Widths = tuple[tuple[int, ...] | None, tuple[int, ...] | None]
"""Of keys and of values of a layer's groups; None where it is copied."""


def loses_less(allocated: torch.Tensor, equal: torch.Tensor) -> bool:
    """Whether an allocated plan loses less than one of equal widths by more than chance, window by window.

    Costs are measured on a little text and add up only roughly, so allocated widths have to prove that they are better.
    In a tie equal ones are better on text of another kind. Windows differ by factors in what any plan loses, so it is
    the ratio that they repeat, not the difference (docs/experiments/errors-that-look-small.md).

    Args:
        allocated: what the allocated plan loses in each window `[k]`.
        equal: what the plan of equal widths loses there.
    """
    ratio = log_ratio(allocated, equal)
    return ratio.stderr is not None and ratio.value > CERTAIN * ratio.stderr


def log_ratio(allocated: torch.Tensor, equal: torch.Tensor) -> Estimate:
    """The mean log ratio of what two plans lose in each window `[k]`."""
    return mean((equal.clamp_min(LEAST_LOSS) / allocated.clamp_min(LEAST_LOSS)).log().tolist())


def best_plan(
    plans: Sequence[FusionPlan],
    streamed: StreamedModel,
    text: CalibrationText,
    windows: torch.Tensor,
    slow: Sequence[Sequence[float]],
    on_progress: Callable[[str, int, int], None],
) -> FusionPlan:
    """The plan that loses least; but the last one, of equal widths, unless the other loses less beyond doubt.

    Arguments as of `plan_losses`.
    """
    losses = plan_losses(plans, streamed, text, windows, slow, on_progress)
    best, chosen = least_loss(losses), choice(losses)
    ratio, pairs = log_ratio(losses[best], losses[-1]), zip(plans, losses.mean(1).tolist(), strict=True)
    logger.info(
        "on %d windows that no plan was made from, widths lose in nats per token: %s (log ratio of the last to the "
        "best other one %.3f, standard error %.3f): they are those of %s",
        len(windows), ", ".join(f"{plan.allocator} {loss:.3f}" for plan, loss in pairs),
        ratio.value, ratio.stderr, plans[chosen].allocator,
    )  # fmt: skip
    return plans[chosen]


def choice(losses: torch.Tensor) -> int:
    """The index of the plan to take, from what each plan loses in each window `[plans, k]`; the last one is of equal
    widths.
    """
    best = least_loss(losses)
    return best if loses_less(losses[best], losses[-1]) else len(losses) - 1


def least_loss(losses: torch.Tensor) -> int:
    """The index of the plan, other than the last one, that loses least by the mean logarithm over windows."""
    return int(losses[:-1].clamp_min(LEAST_LOSS).log().mean(1).argmin())


def plan_losses(
    plans: Sequence[FusionPlan],
    streamed: StreamedModel,
    text: CalibrationText,
    windows: torch.Tensor,
    slow: Sequence[Sequence[float]],
    on_progress: Callable[[str, int, int], None],
) -> torch.Tensor:
    """What each plan loses in each window: KL(source || fused model), in nats per token, `[plans, k]`.

    Args:
        plans: of layout latent, with one group in every layer that is not untouched; what they read is left out.
        streamed: the source.
        text: what was surveyed, which the layers are fitted to.
        windows: the tokens that the divergences are measured on, `[k, T]`.
        slow: of each layer, the planes that may be still, as the survey had them.
        on_progress: called with `compare`, the layers done and all layers.
    """
    states = [streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)]
    source, fused = streamed.embed(windows), [streamed.embed(windows) for _ in plans]
    for layer in streamed.walk(states, [source]):
        variants = _variants(layer, [plan.layers[layer.index] for plan in plans], streamed, slow[layer.index])
        source = layer.outputs[-1]
        for index, variant in enumerate(variants):
            with streamed.layer(layer.index, variant.tensors, variant.keys) as run:
                fused[index] = run(fused[index])
        on_progress("compare", layer.index + 1, streamed.num_layers)
    return window_divergences(streamed, source, fused).cpu() / windows.shape[1]


def _variants(
    source: SourceLayer, layers: Sequence[LayerPlan], streamed: StreamedModel, slow: Sequence[float]
) -> list[Variant]:
    """A source layer as each plan changes it."""
    output = source.weights.output
    fitted, found = captures_for_refit(source.captures, output), dict[Widths, Variant]()
    with factories_on(output.device):
        keys = key_moments(source.captures, streamed.heads)
        values = value_moments(source.captures, output, streamed.heads, None)
        bases = WideBases.of(keys, values, source.captures, streamed.heads, slow)
        for widths in {(layer.key_widths, layer.value_widths) for layer in layers}:
            found[widths] = Variant(source.tensors)
            if widths[0] is not None and widths[1] is not None:
                heads = bases.fused(widths[0][0], widths[1][0])
                found[widths] = with_heads(source.tensors, streamed, heads, refit_output(output, fitted, heads))
    return [found[layer.key_widths, layer.value_widths] for layer in layers]
