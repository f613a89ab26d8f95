"""What a plan's layers must hold to; each check raises ValueError that names the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headfuse.choices import Layout

if TYPE_CHECKING:
    from headfuse.plan import HeadLayout, LayerPlan


def check_partition(groups: Sequence[Sequence[int]], num_heads: int, where: str) -> None:
    """Raise ValueError unless `groups` holds each of `num_heads` heads exactly once."""
    if not all(groups):
        raise ValueError(f"{where}: a group is empty")
    members = sorted(head for group in groups for head in group)
    if len(members) != num_heads or members != list(range(len(members))):  # a damaged number may be beyond any list
        raise ValueError(f"{where}: each source head 0 to {num_heads - 1} must occur in exactly one group")


def check_slots(layer: LayerPlan, frequencies: int) -> None:
    """Raise ValueError unless every key head has a table of this many frequencies."""
    slots = layer.rotary_slots or ()
    if len(slots) != len(layer.key_groups) or any(
        len(head) != frequencies or not all(0 <= f < frequencies for f in head) for head in slots
    ):
        needed = (
            f"each of {len(layer.key_groups)} key heads needs {frequencies} frequencies from 0 to {frequencies - 1}"
        )
        raise ValueError(f"layer {layer.layer_idx}, rotary_slots: {needed}")


def check_wide(layer: LayerPlan, heads: HeadLayout) -> None:
    """Raise ValueError for groups, widths and slots that a layer of wide heads cannot have."""
    where, groups, planes = f"layer {layer.layer_idx}", layer.key_groups, heads.rotary_dim // 2 - layer.still_planes
    if groups != layer.value_groups:
        raise ValueError(f"{where}: wide heads need key_groups equal to value_groups")
    keys, values, slots = layer.key_widths, layer.value_widths, layer.rotary_slots
    if keys is None and values is None and slots is None and layer.untouched and not layer.still_planes:
        return
    if keys is None or values is None or slots is None or {len(keys), len(values), len(slots)} != {len(groups)}:
        raise ValueError(f"{where}: key_widths, value_widths or rotary_slots are missing: each has one entry per group")
    if planes < 0:
        raise ValueError(f"{where}, still_planes: at most {heads.rotary_dim // 2}")
    for group, key, value, table in zip(groups, keys, values, slots, strict=True):
        size, plain = len(group), key - 2 * len(table)
        if max(key, value) > size * heads.head_dim:
            raise ValueError(f"{where}: a group of {size} heads has widths up to {size * heads.head_dim}")
        if not all(0 <= f < planes and table.count(f) <= size for f in set(table)):
            raise ValueError(f"{where}, rotary_slots: planes are from 0 to {planes - 1}, each at most {size} times")
        if (key == 0 and not layer.key_sources) or (value == 0 and not layer.value_sources):
            raise ValueError(f"{where}: a width is at least 1, but for layers that read another one's cache")
        if not 0 <= plain <= size * (heads.head_dim - 2 * planes):
            raise ValueError(f"{where}: a key of width {key} cannot have {len(table)} rotary slots")


def check_one_width(layers: Sequence[LayerPlan], layout: Layout) -> None:
    """Raise ValueError unless all heads of all layers have one width and one table of rotary slots."""
    widths = {width for layer in layers for width in (layer.key_widths or (None,)) + (layer.value_widths or (None,))}
    tables = {table for layer in layers for table in layer.rotary_slots or (None,)}
    if any(layer.still_planes for layer in layers):
        raise ValueError(f"layout {layout} turns all rotary planes: no still_planes")
    if len(widths) > 1 or len(tables) > 1:
        raise ValueError(f"layout {layout} needs one width and one table of rotary slots for all heads of all layers")
    width, table = next(iter(widths)), next(iter(tables))
    if width is None or table is None or 2 * len(table) != width:
        raise ValueError(f"layout {layout}: heads of {width} channels need half as many rotary slots")


def check_sources(layers: Sequence[LayerPlan], layout: Layout, wide: bool) -> None:
    """Raise ValueError unless layers read what different layers before them cache, and in a layout that has such."""
    for layer in layers:
        for name in ("key_sources", "value_sources"):
            sources, where = getattr(layer, name), f"layer {layer.layer_idx}, {name}"
            if sources and not wide:
                raise ValueError(f"{where}: layout {layout} has no layers that read another one's cache")
            if len(set(sources)) < len(sources) or not all(source < layer.layer_idx for source in sources):
                raise ValueError(f"{where}: must be different earlier layers")
            if sources and (len(layer.key_groups) > 1 or layer.key_widths is None):
                raise ValueError(f"{where}: a layer that reads another one has one group, with widths of its own")
            if name == "key_sources" and any(layers[s].still_planes > layer.still_planes for s in sources):
                raise ValueError(f"{where}: a source has more still_planes, and what it caches of them cannot turn")
