"""Configuration of a model whose layers cache wide heads: one key and one value for a whole group of source heads.

This file is shipped beside the weights, so it imports only transformers and the standard library.
"""

from typing import Any

from .configuration_family import rotary_dim
from .configuration_headfuse import FusedConfig, one_head_width

CODE_VERSION = 9  # of the files beside the weights: a release that changes them raises it
AUTO_MAP = {
    "AutoConfig": "configuration_latent.LatentConfig",
    "AutoModel": "modeling_latent.LatentModel",
    "AutoModelForCausalLM": "modeling_latent.LatentForCausalLM",
}


class LatentConfig(FusedConfig):
    """The source model's config, and what each group of source heads caches.

    Attributes that are not set here are read from `source_config`; setting one hides the source's.

    Args:
        headfuse_format: version of these fields.
        source_config: config of the source model, with its `model_type`.
        groups: for each layer, the groups of its source heads `0 .. num_key_value_heads - 1`.
        key_widths: for each layer, the channels of each group's cached key.
        value_widths: for each layer, the channels of each group's cached value.
        rotary_slots: for each layer, the rotary frequency that each slot of each group's cached key carries. Slot s of
            S is the pair of channels (s, s + S); the channels after the slots are not rotated.
        still_planes: None, or for each layer the number of rotary planes, the slowest ones, that it does not turn. Its
            queries have the channels of the other planes first.
        key_sources: None, or for each layer the earlier layers whose cached keys it reads beside its own, in order.
        value_sources: likewise of values. A layer that reads has one group, whose width may be 0 on that side.

    Raises:
        ValueError: naming the field and the layer that do not fit.
    """

    model_type = "headfuse_latent"
    layout = "latent"

    groups: Any = None
    key_widths: Any = None
    value_widths: Any = None
    rotary_slots: Any = None
    still_planes: Any = None
    key_sources: Any = None
    value_sources: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the groups and widths of every layer."""
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        source = self.source_config
        heads = getattr(source, "num_key_value_heads", None) or source.num_attention_heads
        names = ("groups", "key_widths", "value_widths", "rotary_slots")
        for layer_idx, layer in enumerate(zip(*map(self._per_layer, names), strict=True)):
            self._check_still(layer_idx)
            self._check_sources(layer_idx)
            for name, entry in zip(names, layer, strict=True):
                if not isinstance(entry, list | tuple) or len(entry) != len(layer[0]):
                    raise ValueError(f"{name}[{layer_idx}]: must be a list with one entry per group")
            self._check_layer(layer_idx, heads, *layer)
        self._give_layers_one_head()

    def sources(self, layer_idx: int) -> tuple[list[int], list[int]]:
        """The layers whose cached keys and whose cached values a layer reads."""
        keys, values = ([] if read is None else read[layer_idx] for read in (self.key_sources, self.value_sources))
        return list(keys), list(values)

    def is_read(self, layer_idx: int, after: int = -1) -> bool:
        """Whether a later layer, after layer `after`, reads what this one caches."""
        later = (*(self.key_sources or ())[after + 1 :], *(self.value_sources or ())[after + 1 :])
        return any(layer_idx in read for read in later)

    @property
    def last_reader(self) -> int | None:
        """The last layer that reads another one's cache."""
        layers = range(self.source_config.num_hidden_layers)
        return max((i for i in layers if any(self.sources(i))), default=None)

    @property
    def one_head_widths(self) -> list[int]:
        """Channels of each layer's one head in vLLM's cache: of all its keys, or all its values, side by side."""
        widths = zip(self.key_widths, self.value_widths, strict=True)
        return [one_head_width(sum(keys), sum(values)) for keys, values in widths]

    def rotary_planes(self, layer_idx: int) -> int:
        """Rotary planes of a source head that a layer turns."""
        still = 0 if self.still_planes is None else self.still_planes[layer_idx]
        return rotary_dim(self.source_config) // 2 - still

    def _check_layer(self, layer_idx: int, heads: int, groups: Any, keys: Any, values: Any, slots: Any) -> None:
        members = [head for group in groups for head in (group if isinstance(group, list | tuple) else [group])]
        if sorted(map(str, members)) != sorted(map(str, range(heads))) or not all(groups):
            raise ValueError(f"groups[{layer_idx}]: must hold each of the source heads 0 to {heads - 1} exactly once")
        head_dim, planes = self.source_head_dim, self.rotary_planes(layer_idx)
        for group, key, value, table in zip(groups, keys, values, slots, strict=True):
            sides = zip(("key_widths", "value_widths"), (key, value), self.sources(layer_idx), strict=True)
            for name, width, sources in sides:
                reads = bool(sources)
                if type(width) is not int or not 1 - reads <= width <= len(group) * head_dim:
                    raise ValueError(
                        f"{name}[{layer_idx}]: must be from {1 - reads} to {len(group) * head_dim}, not {width!r}"
                    )
            fits = isinstance(table, list | tuple) and all(type(f) is int and 0 <= f < planes for f in table)
            if not fits or 2 * len(table) > key:
                raise ValueError(f"rotary_slots[{layer_idx}]: must be at most {key // 2} integers in [0, {planes})")
            if key - 2 * len(table) > len(group) * (head_dim - 2 * planes):
                raise ValueError(
                    f"key_widths[{layer_idx}]: {key} is more than {len(table)} slots and the other channels"
                )

    def _check_still(self, layer_idx: int) -> None:
        still = 0 if self.still_planes is None else self._per_layer("still_planes")[layer_idx]
        planes = rotary_dim(self.source_config) // 2
        if type(still) is not int or not 0 <= still <= planes:
            raise ValueError(f"still_planes[{layer_idx}]: must be from 0 to {planes}, not {still!r}")

    def _check_sources(self, layer_idx: int) -> None:
        kinds = layer_kinds(self.source_config)
        for name in ("key_sources", "value_sources"):
            sources = [] if getattr(self, name) is None else self._per_layer(name)[layer_idx]
            earlier = isinstance(sources, list | tuple) and all(type(s) is int and 0 <= s < layer_idx for s in sources)
            if not earlier or len(set(sources)) < len(sources):
                raise ValueError(f"{name}[{layer_idx}]: must be a list of different earlier layers, not {sources!r}")
            if any(kinds[source] != kinds[layer_idx] for source in sources):
                raise ValueError(f"{name}[{layer_idx}]: a source has another window, or positions of another kind")
            turning = self.rotary_planes(layer_idx)
            if name == "key_sources" and any(self.rotary_planes(source) < turning for source in sources):
                raise ValueError(f"key_sources[{layer_idx}]: a source has more still_planes")
            if sources and len(self.groups[layer_idx]) != 1:
                raise ValueError(f"groups[{layer_idx}]: a layer that reads another one has one group")


def layer_kinds(config: Any) -> list[tuple[Any, ...]]:
    """The attention window of each layer of a source model, and whether it rotates: a reader's are its source's."""
    layers = config.num_hidden_layers
    options = (getattr(config, name, None) or [None] * layers for name in ("layer_types", "no_rope_layers"))
    return list(zip(*options, strict=True))
