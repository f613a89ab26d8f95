"""ARCHITECTURES: the supported model families, one entry each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from headfuse.errors import UnsupportedModelError

SINKS = "sinks"
"""Attention tensor besides the projections: the score of an extra place that each query head may attend to."""
WRITE_MAPS = ("key_write", "key_write_plain")
"""Tensors of an attention with wide keys behind a norm: how the normed keys of the source make the cached ones."""
READ_MAPS = ("key_read", "key_read_plain", "value_read")
"""Tensors of an attention with wide heads, besides the projections."""


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
    """Norms of queries and keys: over the channels of each head, or over those of all heads at once."""
    norm_names: tuple[str, str] = ("q_norm", "k_norm")
    norm_after_rotary: bool = False
    """The norms stand behind RoPE, and get heads `[batch, heads, tokens, channels]`."""
    norm_option: str | None = None
    """The option of the family's config that has to be set for the norms to be there."""
    norm_form: Literal["row", "rows", "modules"] = "row"
    """Weight of a norm in checkpoints: one row for all heads; a row for each head; or a module for each, `norms.0`."""
    norm_centred: bool = False
    """The norms are LayerNorms: they take the mean off first."""
    norm_offset: float = 0.0
    """What a norm adds to its stored weight before it multiplies with it."""
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

    def layer_prefix(self, layer_idx: int) -> str:
        """Name of one decoder layer."""
        return self.layer.format(layer_idx=layer_idx)

    def place(self, name: str) -> tuple[int | None, str]:
        """The layer of a tensor, and its name in it; None and the whole name for one in no layer."""
        layer = re.escape(self.layer).replace(r"\{layer_idx\}", r"(\d+)")
        match = re.match(layer + r"\.", name)
        return (None, name) if match is None else (int(match[1]), name[match.end() :])

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
        return () if self.key_norm is None else self.norm_names

    def owns(self, name: str) -> bool:
        """Whether AttentionWeights holds the tensor of this name, relative to the layer."""
        module, _, last = name.rpartition(".")
        modules = [f"{self.attention}.{own}" for own in (*self.projections, self.output)]
        norms = tuple(f"{self.attention}.{norm}." for norm in self.norms)
        beside = module == self.attention and last in (SINKS, *WRITE_MAPS, *READ_MAPS)
        return beside or module in modules or (name.startswith(norms) and last == "weight")


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
_MINIMAX = {
    **_MIXTRAL,
    "mlp.e_score_correction_bias": ("block_sparse_moe.e_score_correction_bias",),
}
_PHIMOE = {name.replace("mlp.gate", "mlp.router"): sources for name, sources in _MIXTRAL.items()}
_ERNIE = {
    **_EXPERTS,
    "mlp.gate.moe_statics.e_score_correction_bias": ("mlp.moe_statics.e_score_correction_bias",),
}
_GRANITE = {
    "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
    "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
    "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
}
# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    "apertus": Architecture(key_norm="head"),
    "arcee": Architecture(),
    "bloom": Architecture(
        layer="transformer.h.{layer_idx}", attention="self_attention", packed="query_key_value", packing="heads",
        output="dense", rotary="none", stock_gqa=False, legacy=True,
    ),
    "cohere": Architecture(
        rotary="interleaved", key_norm="head", norm_option="use_qk_norm", norm_form="rows", norm_centred=True
    ),
    "cohere2": Architecture(rotary="interleaved"),
    "cwm": Architecture(),
    "dots1": Architecture(key_norm="head", stacked=_EXPERTS),
    "ernie4_5": Architecture(rotary="interleaved"),
    "ernie4_5_moe": Architecture(rotary="interleaved", stacked=_ERNIE),
    "exaone4": Architecture(key_norm="head"),
    "flex_olmo": Architecture(key_norm="layer", stacked=_EXPERTS),
    "gemma": Architecture(),
    "gemma2": Architecture(),
    "gemma3_text": Architecture(key_norm="head", norm_offset=1.0),
    "glm": Architecture(rotary="interleaved", partial_rotary=True),
    "glm4": Architecture(rotary="interleaved", partial_rotary=True),
    "glm4_moe": Architecture(
        partial_rotary=True, key_norm="head", norm_option="use_qk_norm", stacked=_EXPERTS
    ),
    "gpt2": Architecture(
        layer="transformer.h.{layer_idx}", attention="attn", packed="c_attn", transposed=True, output="c_proj",
        rotary="none", stock_gqa=False,
    ),
    "gpt_neox": Architecture(
        layer="gpt_neox.layers.{layer_idx}", attention="attention", packed="query_key_value", packing="heads",
        output="dense", partial_rotary=True, stock_gqa=False, renamed={"embed_out.": "lm_head."},
    ),
    "gpt_oss": Architecture(),
    "gptj": Architecture(
        layer="transformer.h.{layer_idx}", attention="attn", output="out_proj", rotary="interleaved",
        partial_rotary=True, stock_gqa=False, legacy=True,
    ),
    "granite": Architecture(),
    "granitemoe": Architecture(stacked=_GRANITE),
    "granitemoeshared": Architecture(stacked=_GRANITE),
    "helium": Architecture(rotary="interleaved"),
    "hunyuan_v1_dense": Architecture(
        key_norm="head", norm_names=("query_layernorm", "key_layernorm"), norm_after_rotary=True
    ),
    "hunyuan_v1_moe": Architecture(
        key_norm="head", norm_names=("query_layernorm", "key_layernorm"), norm_after_rotary=True, stacked=_EXPERTS
    ),
    "hyperclovax": Architecture(),
    "jais2": Architecture(),
    "llama": Architecture(),
    "mellum": Architecture(key_norm="head", stacked=_EXPERTS),
    "minimax_m2": Architecture(key_norm="layer", partial_rotary=True, stacked=_MINIMAX),
    "ministral": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(stacked=_MIXTRAL),
    "nemotron": Architecture(partial_rotary=True),
    "olmo": Architecture(),
    "olmo2": Architecture(key_norm="layer"),
    "olmo3": Architecture(key_norm="layer"),
    "olmoe": Architecture(key_norm="layer", stacked=_EXPERTS),
    "opt": Architecture(
        layer="model.decoder.layers.{layer_idx}", output="out_proj", rotary="none", stock_gqa=False
    ),
    "phi": Architecture(
        output="dense", partial_rotary=True, key_norm="head", norm_option="qk_layernorm",
        norm_names=("q_layernorm", "k_layernorm"), norm_centred=True,
    ),
    "phi3": Architecture(packed="qkv_proj", partial_rotary=True),
    "phimoe": Architecture(stacked=_PHIMOE),
    "qwen2": Architecture(),
    "qwen2_moe": Architecture(stacked=_EXPERTS),
    "qwen3": Architecture(key_norm="head"),
    "qwen3_moe": Architecture(key_norm="head", stacked=_EXPERTS),
    "seed_oss": Architecture(),
    "smollm3": Architecture(),
    "solar_open": Architecture(stacked=_EXPERTS),
    "stablelm": Architecture(
        partial_rotary=True, key_norm="head", norm_option="qk_layernorm", norm_form="modules",
        norm_names=("q_layernorm", "k_layernorm"), norm_centred=True,
    ),
    "starcoder2": Architecture(),
    "vaultgemma": Architecture(),
}
_MLA = "its keys and values are already compressed together (multi-head latent attention)"
_HYBRID = "some of its layers have a state or a convolution instead of attention, and a plan needs heads in every layer"
_SHARED = "some of its layers read the keys and values that another layer cached"
_OLD = "its attention does not use the attention interface of transformers, and headfuse does not know its form"
UNSUPPORTED: dict[str, str] = {
    "headfuse": "is already a model with heads of its own in every layer",
    "headfuse_latent": "is already a model with heads of its own in every layer",
    "nemotron-nas": "is already a model with heads of its own in every layer",
    "mpt": "its attention has a bias (ALiBi), and headfuse does not know the form of its projections",
    "falcon": "its class repeats keys and values for every query head before it caches them, so no cache would shrink",
    "gpt_bigcode": "it has a single key head and value head, or headfuse does not know how its projections are fused",
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "minicpm3": _MLA,
    "glm4_moe_lite": _MLA,
    "youtu": _MLA,
    "gemma3n_text": _SHARED,
    "gemma4_text": _SHARED,
    "bamba": _HYBRID,
    "falcon_h1": _HYBRID,
    "granitemoehybrid": _HYBRID,
    "jamba": _HYBRID,
    "lfm2": _HYBRID,
    "minimax": _HYBRID,
    "nemotron_h": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "recurrent_gemma": _HYBRID,
    "bitnet": "its weights are trained to have three values, and fused weights would have more",
    "codegen": "its one projection of queries, keys and values is interleaved over four shards",
    "diffllama": "it takes the difference of two attentions, whose values are two heads wide",
    "gpt_neo": _OLD,
    "gpt_neox_japanese": _OLD,
    "llama4_text": "its keys have a norm without weights behind RoPE, and its queries a scale by position",
    "ministral3": "its queries are scaled by position, which headfuse's model code does not do",
    "nanochat": "its keys have a norm without weights behind RoPE",
    "persimmon": "it has a norm of keys behind one projection of queries, keys and values",
    "xglm": _OLD,
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
        if model_type in ("headfuse", "headfuse_latent", "nemotron-nas"):
            raise UnsupportedModelError(
                UNSUPPORTED[model_type], where=where, fix="fuse the source model at the budget you want"
            )
        reason = UNSUPPORTED.get(model_type, "headfuse does not know where its heads are and how it rotates keys")
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported: {reason}",
            where=where,
            fix=f"supported: {', '.join(sorted(ARCHITECTURES))}; add one as docs/contributing/add_a_family.md says",
        )
    return ARCHITECTURES[model_type]
