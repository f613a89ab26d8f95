"""Which earlier layers a layer reads, and the rotary slots that it then caches itself."""

from __future__ import annotations

from collections.abc import Callable

from headfuse.fusion.reading import Cached
from headfuse.fusion.reading_layer import Kept, conditional_slots, latent_cache
from headfuse.modeling.configuration_latent import layer_kinds
from headfuse.models.placement import factories_on
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan
from headfuse.text.calibration import START_WEIGHT, CalibrationText


def with_sources(
    plan: FusionPlan,
    streamed: StreamedModel,
    text: CalibrationText,
    reach: int,
    on_progress: Callable[[str, int, int], None],
) -> FusionPlan:
    """A plan in which every layer reads what up to `reach` layers before it cache, at the same widths.

    Widths stay as they were allocated without reading, so cache bytes are the same. Slots are chosen anew, for what the
    read keys leave. Slow planes are still in all layers of a kind that are not untouched, or in none: what a layer
    caches of a still plane serves only a reader whose plane is still, too. Layers with another window or other
    positions are not read; untouched layers read nothing.

    Args:
        plan: of layout latent, one group in every layer that is not untouched.
        streamed: the source.
        text: what slots are chosen on.
        reach: how many layers of a layer's own kind it may read.
        on_progress: called with `sources`, the layers done and all layers.
    """
    kinds, kept = layer_kinds(streamed.config.get_text_config()), Kept()
    alike = {kind: [layer for layer, own in zip(plan.layers, kinds, strict=True) if own == kind] for kind in kinds}
    most = {kind: max(layer.still_planes for layer in layers) for kind, layers in alike.items()}
    states = [streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)]
    for source in streamed.walk(states):
        layer, index, still = plan.layers[source.index], source.index, most[kinds[source.index]]
        near = [i for i in range(index) if kinds[i] == kinds[index]][-reach:]
        with factories_on(streamed.device):
            if not layer.untouched and (near or layer.still_planes != still):
                assert layer.key_widths is not None
                read = Cached.together([kept[i] for i in near]) if near else None
                slots = conditional_slots(source.captures, plan.heads, read, layer.key_widths[0], still)
                found = {
                    "key_sources": tuple(near), "value_sources": tuple(near), "rotary_slots": (slots,),
                    "still_planes": still,
                }  # fmt: skip
                layers = (*plan.layers[:index], layer.model_copy(update=found), *plan.layers[index + 1 :])
                plan = plan.model_copy(update={"layers": layers})
            kept[index] = latent_cache(source.weights.output, source.captures, plan, index, kept)
        for unread in [i for i in range(index + 1) if kinds[i] == kinds[index]][:-reach]:
            kept.pop(unread, None)
        on_progress("sources", index + 1, streamed.num_layers)
    return plan
