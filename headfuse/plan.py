"""Which heads are fused: the data shared by budget, grouping, conversion and plan.json. No torch, no I/O."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from headfuse.choices import ONE_COUNT, ONE_WIDTH, SHARED_PARTITION, WIDE, Layout, Side
from headfuse.errors import ConfigError, validation_summary
from headfuse.plan_checks import check_one_width, check_partition, check_slots, check_sources, check_wide

Groups = tuple[tuple[int, ...], ...]
"""A partition of a layer's source heads: one tuple of source head indices per fused head."""
_Count = Annotated[int, Field(ge=1)]
_Width = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HeadLayout(_Frozen):
    """The attention heads of a source model, equal in all its layers."""

    model_type: str
    num_hidden_layers: _Count
    hidden_size: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Count
    rotary_dim: int = Field(default_factory=lambda fields: fields.get("head_dim", 0))
    """Channels of a key head that RoPE rotates; all of them where a plan does not say."""

    @property
    def queries_per_head(self) -> int:
        """Query heads that read one source KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def total_heads(self) -> int:
        """Key heads plus value heads over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads

    def source_head(self, query_head: int) -> int:
        """The source KV head `kv(h)` that query head `h` reads."""
        return query_head // self.queries_per_head

    @property
    def kv_channels(self) -> int:
        """Numbers that the cache holds of one token, over all layers."""
        return self.total_heads * self.head_dim

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Cache bytes that one token takes over all layers, at `itemsize` bytes a number."""
        return self.kv_channels * itemsize


class HeadBudget(_Frozen):
    """How many key heads and value heads each layer keeps."""

    key_heads: tuple[int, ...]
    value_heads: tuple[int, ...]

    @property
    def total(self) -> int:
        """Key heads plus value heads over all layers."""
        return sum(self.key_heads) + sum(self.value_heads)


class LayerPlan(_Frozen):
    """The key groups and value groups of one layer; each group becomes one fused head."""

    layer_idx: int
    key_groups: Groups
    value_groups: Groups
    rotary_slots: Groups | None = None
    """The frequency that each slot of each fused key head carries, `[key heads, rotary_dim / 2]`; None: stock order.

    A key head with a width of its own has as many slots as its group was given."""
    key_widths: tuple[_Width, ...] | None = None
    """Channels of each fused key head; None: `head_dim`. 0 only where another layer's are read."""
    value_widths: tuple[_Width, ...] | None = None
    """Channels of each fused value head; None: `head_dim`. 0 only where another layer's are read."""
    still_planes: _Width = 0
    """The rotary planes, the slowest ones, that the fused layer does not turn; only of a wide head."""
    key_sources: tuple[_Width, ...] = ()
    """The earlier layers whose cached keys this one reads beside its own."""
    value_sources: tuple[_Width, ...] = ()
    """The earlier layers whose cached values this one reads beside its own."""

    @property
    def untouched(self) -> bool:
        """True when every group holds one head of its own width, so the layer is copied bit for bit."""
        return not self.wide and all(len(group) == 1 for group in self.key_groups + self.value_groups)

    @property
    def wide(self) -> bool:
        """True when its heads have widths of their own, and every query head reads all of one."""
        return self.key_widths is not None or self.value_widths is not None

    @property
    def reads(self) -> bool:
        """True when it reads what earlier layers cache."""
        return bool(self.key_sources or self.value_sources)

    def channels(self, side: Side, head_dim: int) -> int:
        """Numbers that the cache holds of one token's keys or values."""
        groups, widths = (self.key_groups, self.key_widths) if side == "key" else (self.value_groups, self.value_widths)
        return len(groups) * head_dim if widths is None else sum(widths)

    @model_serializer(mode="wrap")
    def _as_before_without_widths(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        of_wide_heads = ("_widths", "_sources", "still_planes")
        return {name: value for name, value in fields.items() if not name.endswith(of_wide_heads) or value}


class SourceModel(_Frozen):
    """A source by name, revision and content, never by path."""

    name: str
    revision: str | None = None
    """The commit of a hub repository."""
    fingerprint: str

    @property
    def model(self) -> str:
        """The MODEL argument that names this source: `name`, or `name@revision`."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


class FusionPlan(_Frozen):
    """Everything that decides the fused model's shape; `plan.json`."""

    plan_format: Literal[1] = 1
    headfuse_version: str
    source: SourceModel
    heads: HeadLayout
    layout: Layout
    method: str
    allocator: str
    budget: str
    max_positions: _Count | None = None
    """Tokens of the longest text that the fused model is for; None: the source's."""
    layers: tuple[LayerPlan, ...]
    files: dict[str, str] = {}
    """SHA-256 of every written file but plan.json itself."""
    seal: str | None = None
    """SHA-256 of this plan without its seal, where it was written beside the files."""

    @model_validator(mode="after")
    def _consistent(self) -> FusionPlan:
        heads = self.heads
        numbers = [layer.layer_idx for layer in self.layers]
        if len(numbers) != heads.num_hidden_layers or numbers != list(range(len(numbers))):
            raise ValueError(f"layers must be numbered 0 to {heads.num_hidden_layers - 1} in order")
        for layer in self.layers:
            for side, groups in (("key", layer.key_groups), ("value", layer.value_groups)):
                check_partition(groups, heads.num_key_value_heads, f"layer {layer.layer_idx}, {side}_groups")
            if self.layout in WIDE or (layer.wide and self.layout in ONE_WIDTH):
                check_wide(layer, heads)
            elif layer.wide:
                raise ValueError(f"layer {layer.layer_idx}: layout {self.layout} has heads of the source's width only")
            elif layer.rotary_slots is not None:
                check_slots(layer, heads.rotary_dim // 2)
            if self.layout in SHARED_PARTITION:
                where = f"layer {layer.layer_idx}: layout {self.layout}"
                if layer.rotary_slots is not None and not layer.wide:
                    raise ValueError(f"{where} has rotary slots in the stock order only")
                if layer.key_groups != layer.value_groups:
                    raise ValueError(f"{where} needs key_groups equal to value_groups")
                if len({len(group) for group in layer.key_groups}) > 1:
                    raise ValueError(f"{where} needs groups of one size")
        check_sources(self.layers, self.layout, self.layout in WIDE)
        if self.layout in ONE_COUNT and len({len(layer.key_groups) for layer in self.layers}) > 1:
            raise ValueError(f"layout {self.layout} needs the same number of heads in every layer")
        if self.layout in ONE_WIDTH and any(layer.wide for layer in self.layers):
            check_one_width(self.layers, self.layout)
        return self

    @property
    def head_width(self) -> int | None:
        """Channels of every head of a model whose heads have one width of their own; None for all others."""
        return next(iter(self.layers[0].key_widths or ()), None) if self.layout in ONE_WIDTH else None

    @property
    def sources(self) -> set[int]:
        """The layers whose cache later ones read."""
        return {source for layer in self.layers for source in (*layer.key_sources, *layer.value_sources)}

    @property
    def written_heads(self) -> HeadLayout:
        """The heads of the written attention: the source's, or as wide as `head_width`."""
        own = {} if self.head_width is None else dict.fromkeys(("head_dim", "rotary_dim"), self.head_width)
        return self.heads.model_copy(update=own)

    @property
    def head_budget(self) -> HeadBudget:
        """The head counts of this plan."""
        keys = tuple(len(layer.key_groups) for layer in self.layers)
        return HeadBudget(key_heads=keys, value_heads=tuple(len(layer.value_groups) for layer in self.layers))

    @property
    def kv_channels(self) -> int:
        """Numbers that the cache holds of one token, over all layers."""
        return sum(self.key_channels) + sum(self.value_channels)

    @property
    def key_channels(self) -> list[int]:
        """Channels of keys that each layer caches."""
        return [layer.channels("key", self.heads.head_dim) for layer in self.layers]

    @property
    def value_channels(self) -> list[int]:
        """Channels of values that each layer caches."""
        return [layer.channels("value", self.heads.head_dim) for layer in self.layers]

    @property
    def kv_ratio(self) -> float:
        """Kept share of the source's KV cache bytes."""
        return self.kv_channels / self.heads.kv_channels

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Cache bytes that one token takes after fusion, at `itemsize` bytes a number."""
        return self.kv_channels * itemsize

    @model_serializer(mode="wrap")
    def _as_before_without_positions(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        return {name: value for name, value in fields.items() if name != "max_positions" or value}

    def to_json(self) -> str:
        """The text of plan.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    def sealed(self) -> FusionPlan:
        """This plan with the seal that a damaged plan.json does not match."""
        digest = hashlib.sha256(self.model_copy(update={"seal": None}).to_json().encode()).hexdigest()
        return self.model_copy(update={"seal": digest})

    @classmethod
    def from_json(cls, text: str, where: str = "plan.json") -> FusionPlan:
        """Parse and check the text of a plan.json.

        Raises:
            ConfigError: naming every problem at once.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(
                validation_summary(error), where=where, fix="write a new plan with `headfuse analyze`"
            ) from None


def head_of_source(groups: Groups) -> list[int]:
    """The fused head of each source head."""
    owner = {head: index for index, group in enumerate(groups) for head in group}
    return [owner[head] for head in range(len(owner))]
