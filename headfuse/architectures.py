"""ARCHITECTURES: one entry per model family, saying where its heads live. Adding a family is adding an entry."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.plan import HeadLayout


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its attention projections, and what it does to queries and keys before they meet.

    Tensor names are relative to the attention module; `{layer_idx}` stands for the layer.
    """

    layer: str = "model.layers.{layer_idx}"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    packed: str | None = None
    """The one projection that holds query, key and value instead of three."""
    packing: Literal["blocks", "heads"] = "blocks"
    """Rows of `packed`: all queries, then all keys, then all values; or query, key and value of one head after another.
    """
    transposed: bool = False
    """`packed` and `output` are stored `[in, out]` (Conv1D)."""
    rotary: Literal["half", "interleaved", "none"] = "half"
    """Planes of RoPE among r rotated channels: (i, i + r / 2), (2 i, 2 i + 1), or no RoPE at all."""
    partial_rotary: bool = False
    """The family reads `partial_rotary_factor`: only that share of a head's channels, the first ones, is rotated."""
    key_norm: Literal["head", "layer"] | None = None
    """`q_norm` and `k_norm` before RoPE: over the channels of each head, or over those of all heads at once."""
    stock_gqa: bool = True
    """The family's own class has `num_key_value_heads`."""
    legacy: bool = False
    """The attention does not go through the attention interface of all supported versions of transformers, and the
    layers may give tuples: the source is read as the decoupled model that it equals."""
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters of a layer's module that checkpoints hold in parts: their names, relative to the layer; `{expert}`
    counts from 0, its parts are stacked, and several names are concatenated within each expert."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of tensor names in checkpoints, and in the model."""
    refused: tuple[str, ...] = ()
    """Options of the family's config that change the attention in a way that is not supported."""

    def layer_prefix(self, layer_idx: int) -> str:
        """Name of one decoder layer."""
        return self.layer.format(layer_idx=layer_idx)

    def attention_prefix(self, layer_idx: int) -> str:
        """Name of one layer's attention module."""
        return f"{self.layer_prefix(layer_idx)}.{self.attention}"

    def model_names(self, stored: Iterable[str]) -> dict[str, str]:
        """The model's name of each stored tensor; checkpoints of the base model alone lack the first part."""
        base = self.layer.partition(".")[0] + "."
        names = {name: name for name in stored}
        for old, new in self.renamed.items():
            names = {name: new + n.removeprefix(old) if n.startswith(old) else n for name, n in names.items()}
        if not any(name.startswith(base) for name in names.values()):
            names = {name: n if n.startswith("lm_head.") else base + n for name, n in names.items()}
        return names if len(set(names.values())) == len(names) else {name: name for name in names}

    def decoupled(self) -> Architecture:
        """How the model code of layout decoupled stores this family: as modules hold it, in the canonical order."""
        return replace(
            self, packed=None, query="q_proj", key="k_proj", value="v_proj", rotary="half", stacked={}, renamed={}
        )

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections in front of the attention."""
        return (self.query, self.key, self.value) if self.packed is None else (self.packed,)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms of queries and keys."""
        return () if self.key_norm is None else ("q_norm", "k_norm")

    def owns(self, name: str) -> bool:
        """Whether AttentionWeights holds the tensor of this name, relative to the layer."""
        modules = (*self.projections, self.output, *self.norms)
        return name.rpartition(".")[0] in [f"{self.attention}.{module}" for module in modules]


_EXPERTS = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
}
_MIXTRAL = {
    "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
    "mlp.experts.gate_up_proj": (
        "block_sparse_moe.experts.{expert}.w1.weight",
        "block_sparse_moe.experts.{expert}.w3.weight",
    ),
    "mlp.experts.down_proj": ("block_sparse_moe.experts.{expert}.w2.weight",),
}

# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    "bloom": Architecture(
        layer="transformer.h.{layer_idx}", attention="self_attention", packed="query_key_value", packing="heads",
        output="dense", rotary="none", stock_gqa=False, legacy=True,
    ),
    "cohere": Architecture(rotary="interleaved", refused=("use_qk_norm",)),
    "gemma": Architecture(),
    "gpt2": Architecture(
        layer="transformer.h.{layer_idx}", attention="attn", packed="c_attn", transposed=True, output="c_proj",
        rotary="none", stock_gqa=False,
    ),
    "gpt_neox": Architecture(
        layer="gpt_neox.layers.{layer_idx}", attention="attention", packed="query_key_value", packing="heads",
        output="dense", partial_rotary=True, stock_gqa=False, renamed={"embed_out.": "lm_head."},
    ),
    "gptj": Architecture(
        layer="transformer.h.{layer_idx}", attention="attn", output="out_proj", rotary="interleaved",
        partial_rotary=True, stock_gqa=False, legacy=True,
    ),
    "granite": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(stacked=_MIXTRAL),
    "olmo": Architecture(),
    "olmo2": Architecture(key_norm="layer"),
    "olmoe": Architecture(key_norm="layer", stacked=_EXPERTS),
    "opt": Architecture(
        layer="model.decoder.layers.{layer_idx}", output="out_proj", rotary="none", stock_gqa=False
    ),
    "phi": Architecture(output="dense", partial_rotary=True, refused=("qk_layernorm",)),
    "phi3": Architecture(packed="qkv_proj", partial_rotary=True),
    "qwen2": Architecture(),
    "qwen2_moe": Architecture(stacked=_EXPERTS),
    "qwen3": Architecture(key_norm="head"),
    "qwen3_moe": Architecture(key_norm="head", stacked=_EXPERTS),
    "stablelm": Architecture(partial_rotary=True, refused=("qk_layernorm",)),
}
# fmt: on

_MLA = "its keys and values are already compressed together (multi-head latent attention)"
UNSUPPORTED: dict[str, str] = {
    "headfuse": "is already a model with heads of its own in every layer",
    "nemotron-nas": "is already a model with heads of its own in every layer",
    "mpt": "its attention has a bias (ALiBi) and projections of a form that is not known here",
    "falcon": "its class repeats keys and values for every query head before it caches them, so no cache would shrink",
    "gpt_bigcode": "it has a single key head and value head, or its layout of fused projections is not known here",
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "minicpm3": _MLA,
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "rwkv": "it has no attention",
}
"""Why a family that people ask for is not in the table."""


def architecture_of(model_type: str, where: object = None) -> Architecture:
    """The table entry of a family.

    Raises:
        UnsupportedModelError: saying why, and naming the families that are supported.
    """
    if model_type not in ARCHITECTURES:
        if model_type in ("headfuse", "nemotron-nas"):
            raise UnsupportedModelError(
                UNSUPPORTED[model_type], where=where, fix="fuse the source model at the budget you want"
            )
        reason = UNSUPPORTED.get(model_type, "nothing is known about where its heads are and how it rotates keys")
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported: {reason}",
            where=where,
            fix=f"supported: {', '.join(sorted(ARCHITECTURES))}; docs/add_an_architecture.md tells how to add one",
        )
    return ARCHITECTURES[model_type]


def head_layout(config: Any, where: object = None) -> HeadLayout:
    """Read the heads of a supported model from its transformers config.

    Raises:
        UnsupportedModelError: for a family, an option or a rotary style that is not supported.
        CheckpointError: for head counts that do not divide.
    """
    arch = architecture_of(config.model_type, where)
    num_heads = config.num_attention_heads
    num_kv = (getattr(config, "num_key_value_heads", None) or num_heads) if arch.stock_gqa else num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    for name, value in (
        ("num_hidden_layers", config.num_hidden_layers),
        ("hidden_size", config.hidden_size),
        ("num_attention_heads", num_heads),
        ("num_key_value_heads", num_kv),
        ("head_dim", head_dim),
    ):
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{name} is {value}", where=where, fix="restore the model's own config.json")
    if num_heads % num_kv:
        raise CheckpointError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv}",
            where=where,
            fix="restore the model's own config.json",
        )
    for option in arch.refused:
        if getattr(config, option, None):
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} is not supported with {option}: a LayerNorm over each head of "
                "queries and keys (docs/architectures.md)",
                where=where,
                fix=f"choose a model without {option}",
            )
    return HeadLayout(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(config, arch, head_dim, where),
    )


def _rotary_dim(config: Any, arch: Architecture, head_dim: int, where: object) -> int:
    if arch.rotary == "none":
        return 0
    factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor") or 1.0
    if factor != 1.0 and not arch.partial_rotary:
        raise UnsupportedModelError(
            f"keys that are rotated only in part are not supported for model_type {config.model_type!r}",
            where=where,
            fix="choose a model whose whole heads are rotated",
        )
    rotated = getattr(config, "rotary_dim", None) or int(head_dim * factor)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise CheckpointError(
            f"{rotated} channels of a head's {head_dim} are rotated, which are no pairs",
            where=where,
            fix="restore the model's own config.json",
        )
    return rotated


def canonical_order(arch: Architecture, heads: HeadLayout) -> list[int] | None:
    """The channel of a query or key head at each place of the canonical order; None where that is the family's own.

    Canonical: the first channels of all rotary planes, the second ones, then what is not rotated.
    """
    if arch.rotary != "interleaved":
        return None
    rotated = heads.rotary_dim
    return [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, heads.head_dim)]


def module_tensors(tensors: Mapping[str, torch.Tensor], arch: Architecture) -> dict[str, torch.Tensor]:
    """A layer's stored tensors (names relative to it) as its module holds them: experts stacked."""
    held = dict(tensors)
    for parameter, sources in arch.stacked.items():
        stored = [_numbered(held, source) if "{expert}" in source else [source] for source in sources]
        if stored[0] and all(name in held for names in stored for name in names):
            parts = [[held.pop(name) for name in names] for names in stored]
            single = "{expert}" not in sources[0]
            held[parameter] = parts[0][0] if single else torch.cat([torch.stack(part) for part in parts], dim=1)
    return held


def _numbered(tensors: Mapping[str, torch.Tensor], pattern: str) -> list[str]:
    names = (pattern.format(expert=expert) for expert in itertools.count())
    return list(itertools.takewhile(tensors.__contains__, names))


@dataclass
class AttentionWeights:
    """The projections of one layer, head by head; channels of queries and keys in the canonical order.

    Shapes: `query [n_q, d, D]`, `key [n_k, d, D]`, `value [n_v, d, D]`, `output [D, n_q, d]`; biases `[n, d]` for
    query, key and value, `[D]` for the output, or None; weights of the norms of queries and keys `[1, d]` where each
    head has one, `[n, d]` where the layer has one.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_bias: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], arch: Architecture, heads: HeadLayout
    ) -> AttentionWeights:
        """Split an attention module's tensors (names relative to it) into heads."""
        output = tensors[f"{arch.output}.weight"]
        output = output.T if arch.transposed else output
        found: dict[str, torch.Tensor | None] = {"output_bias": tensors.get(f"{arch.output}.bias")}
        found["output"] = output.reshape(output.shape[0], -1, heads.head_dim)
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            for side, tensor in zip(
                ("query", "key", "value"), split_projections(tensors, kind, arch, heads), strict=True
            ):
                shape = (
                    (-1, heads.head_dim)
                    if tensor is None or tensor.ndim == 1
                    else (-1, heads.head_dim, tensor.shape[-1])
                )
                found[side + suffix] = None if tensor is None else tensor.reshape(shape)
        for side, name in zip(("query", "key"), arch.norms, strict=False):
            found[f"{side}_norm"] = tensors[f"{name}.weight"].view(-1, heads.head_dim)
        return cls(**found)._reordered(canonical_order(arch, heads))  # type: ignore[arg-type]

    @classmethod
    def of_layer(cls, tensors: Mapping[str, torch.Tensor], arch: Architecture, heads: HeadLayout) -> AttentionWeights:
        """The attention projections among a layer's tensors (names relative to the layer)."""
        prefix = arch.attention + "."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return cls.from_tensors(own, arch, heads)

    def in_layer(
        self,
        tensors: Mapping[str, torch.Tensor],
        arch: Architecture,
        heads: HeadLayout,
        stored: Architecture | None = None,
    ) -> dict[str, torch.Tensor]:
        """A layer's tensors with these projections in the place of its own, `stored` as another family has them."""
        stored = stored or arch
        others = {name: tensor for name, tensor in tensors.items() if not arch.owns(name)}
        others = module_tensors(others, arch) if arch.stacked and not stored.stacked else others
        own = {f"{stored.attention}.{name}": tensor for name, tensor in self.to_tensors(stored, heads).items()}
        return {**others, **own}

    def to_tensors(self, arch: Architecture, heads: HeadLayout) -> dict[str, torch.Tensor]:
        """The inverse of `from_tensors`."""
        order = canonical_order(arch, heads)
        own = self._reordered(order and sorted(range(len(order)), key=order.__getitem__))
        output = own.output.flatten(1, 2)
        tensors = {
            f"{arch.output}.weight": output.T.contiguous() if arch.transposed else output,
            f"{arch.output}.bias": own.output_bias,
        }
        weights, biases = (own.query, own.key, own.value), (own.query_bias, own.key_bias, own.value_bias)
        for kind, parts in (("weight", weights), ("bias", biases)):
            flat = [None if part is None else part.flatten(0, 1) for part in parts]
            tensors |= _join(flat, kind, arch, heads)
        for name, norm in zip(arch.norms, (own.query_norm, own.key_norm), strict=False):
            tensors[f"{name}.weight"] = None if norm is None else norm.flatten()
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def resized(self, num_key_heads: int, num_value_heads: int) -> AttentionWeights:
        """Weights of other head counts, without content."""

        def empty(tensor: Any, count: int) -> Any:
            return None if tensor is None else tensor.new_empty((count, *tensor.shape[1:]))

        norm = (
            self.key_norm if self.key_norm is None or len(self.key_norm) == 1 else empty(self.key_norm, num_key_heads)
        )
        return replace(
            self,
            key=empty(self.key, num_key_heads),
            key_bias=empty(self.key_bias, num_key_heads),
            key_norm=norm,
            value=empty(self.value, num_value_heads),
            value_bias=empty(self.value_bias, num_value_heads),
        )

    def _reordered(self, order: list[int] | None) -> AttentionWeights:
        """These weights with the channels of queries and keys in another order."""
        if order is None:
            return self
        moved = ("query", "key", "query_bias", "key_bias", "query_norm", "key_norm")
        parts = {name: getattr(self, name) for name in moved}
        changed: dict[str, Any] = {n: None if part is None else part[:, order] for n, part in parts.items()}
        return replace(self, **changed)


def split_projections(
    tensors: Mapping[str, torch.Tensor], kind: str, arch: Architecture, heads: HeadLayout
) -> list[torch.Tensor | None]:
    """Rows `[n d, D]` (`weight`) or `[n d]` (`bias`) of query, key and value, as a family stores them."""
    if arch.packed is None:
        return [tensors.get(f"{name}.{kind}") for name in arch.projections]
    whole = tensors.get(f"{arch.packed}.{kind}")
    if whole is None:
        return [None, None, None]
    whole = whole.T if arch.transposed and kind == "weight" else whole
    if arch.packing == "heads":
        return [part.flatten(0, 1) for part in whole.unflatten(0, (-1, 3, heads.head_dim)).unbind(1)]
    queries = heads.num_attention_heads * heads.head_dim
    pairs = (len(whole) - queries) // 2
    return list(whole.split([queries, pairs, pairs]))


def packed_keys_and_values(arch: Architecture, heads: HeadLayout, num_rows: int) -> torch.Tensor:
    """The rows of a packed projection, of `num_rows` in all, that make keys and values."""
    _, keys, values = split_projections({f"{arch.packed}.bias": torch.arange(num_rows)}, "bias", arch, heads)
    assert keys is not None
    assert values is not None
    return torch.cat([keys, values])


def _join(
    parts: list[torch.Tensor | None], kind: str, arch: Architecture, heads: HeadLayout
) -> dict[str, torch.Tensor | None]:
    """The inverse of `split_projections`, by name."""
    if arch.packed is None:
        return {f"{name}.{kind}": part for name, part in zip(arch.projections, parts, strict=True)}
    present = [part for part in parts if part is not None]
    if not present:
        return {}
    if arch.packing == "heads":
        by_head = [part.unflatten(0, (-1, heads.head_dim)) for part in present]
        whole = torch.stack(by_head, dim=1).flatten(0, 2)
    else:
        whole = torch.cat(present)
    return {f"{arch.packed}.{kind}": whole.T.contiguous() if arch.transposed and kind == "weight" else whole}
