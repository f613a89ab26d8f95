"""LAYOUTS: how a fused model is stored on disk, and which runtimes load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headfuse.layouts import decoupled, gqa, latent, layerwise
from headfuse.models.attention import AttentionWeights
from headfuse.models.families import Architecture
from headfuse.plan import FusionPlan, LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["LAYOUTS", "LayoutFormat", "loads_in"]


def _with_fewer_heads(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    return weights.resized(len(layer.key_groups), len(layer.value_groups))


@dataclass(frozen=True)
class LayoutFormat:
    """One layout: its config.json, its families, the arrangement of its heads, and the runtimes that load it."""

    config: Callable[[dict[str, Any], FusionPlan], dict[str, Any]]
    arrange: Callable[[AttentionWeights, LayerPlan, FusionPlan], AttentionWeights]
    runtimes: str
    check: Callable[[PreTrainedConfig], None]
    """Raises UnsupportedModelError for a source that the layout cannot hold."""
    stored: Callable[[Architecture], Architecture] = lambda arch: arch
    """Names and order of the attention's tensors in the output, given the source's."""
    sized: Callable[[AttentionWeights, LayerPlan, FusionPlan], AttentionWeights] = _with_fewer_heads
    """Weights with the shapes that a layer is written with, but without data."""
    free_slots: bool = False
    """Fused key heads may choose which frequencies their rotary slots carry."""
    shared_partition: bool = True
    """Keys and values share one partition of a layer's heads, into groups of one size."""
    one_count: bool = False
    """All layers have the same number of heads."""
    stock_class: bool = False
    """The model is one of the source's own class."""
    wide: bool = False
    """One fused head serves a whole group of source heads, with a width and read maps of its own."""
    one_width: bool = False
    """Heads may have another width than the source's (`--head-dim`), one for the whole model."""


_IN_TRANSFORMERS = "transformers (import headfuse.modeling, or trust_remote_code=True)"
_BY_MODEL_CODE = f"{_IN_TRANSFORMERS}, vLLM (trust_remote_code=True, without tensor parallelism)"

LAYOUTS: dict[str, LayoutFormat] = {
    "decoupled": LayoutFormat(
        decoupled.config,
        decoupled.arrange,
        _BY_MODEL_CODE,
        decoupled.check,
        decoupled.stored,
        free_slots=True,
        shared_partition=False,
    ),
    "layerwise": LayoutFormat(
        layerwise.config,
        gqa.arrange,
        "vLLM (DeciLM, trust_remote_code=True), llama.cpp after `headfuse export --to gguf`, "
        "transformers (import headfuse.modeling, or trust_remote_code=True)",
        layerwise.check,
    ),
    "gqa": LayoutFormat(
        gqa.config,
        gqa.arrange,
        "transformers, vLLM, SGLang and TensorRT-LLM (stock class), llama.cpp after `headfuse export --to gguf`",
        gqa.check,
        sized=gqa.sized,
        one_count=True,
        stock_class=True,
        one_width=True,
    ),
    "latent": LayoutFormat(
        latent.config,
        latent.arrange,
        _BY_MODEL_CODE,
        latent.check,
        latent.stored,
        latent.sized,
        free_slots=True,
        shared_partition=False,
        wide=True,
    ),
}


def loads_in(plan: FusionPlan) -> str:
    """The runtimes that load a model of this plan."""
    return _IN_TRANSFORMERS if plan.sources else LAYOUTS[plan.layout].runtimes
