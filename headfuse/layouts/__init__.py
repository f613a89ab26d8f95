"""LAYOUTS: how a fused model lies on disk, and which runtimes load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headfuse.architectures import AttentionWeights
from headfuse.layouts import decoupled, gqa
from headfuse.plan import FusionPlan, LayerPlan, head_of_source


@dataclass(frozen=True)
class LayoutFormat:
    """The config.json of a layout, the order of its heads, and the runtimes that load it."""

    config: Callable[[dict[str, Any], FusionPlan], dict[str, Any]]
    arrange: Callable[[AttentionWeights, LayerPlan, FusionPlan], AttentionWeights]
    restore: Callable[[AttentionWeights, LayerPlan, FusionPlan], AttentionWeights]
    runtimes: str


LAYOUTS: dict[str, LayoutFormat] = {
    "decoupled": LayoutFormat(
        decoupled.config,
        decoupled.arrange,
        decoupled.restore,
        "transformers (import headfuse.modeling, or trust_remote_code=True)",
    ),
    "gqa": LayoutFormat(
        gqa.config, gqa.arrange, gqa.restore, "transformers, vLLM, SGLang, TensorRT-LLM, llama.cpp (stock class)"
    ),
}
LAYOUT_FOR = {"transformers": "decoupled", "vllm": "gqa", "llama.cpp": "gqa", "sglang": "gqa"}
"""The layout that `--for RUNTIME` picks."""


def expand(weights: AttentionWeights, layer: LayerPlan, plan: FusionPlan) -> AttentionWeights:
    """A written layer in the source's shape: fused heads repeated, query heads in the source's order."""
    weights = LAYOUTS[plan.layout].restore(weights, layer, plan)
    keys, values = head_of_source(layer.key_groups), head_of_source(layer.value_groups)
    weights.key, weights.value = weights.key[keys], weights.value[values]
    weights.key_bias = None if weights.key_bias is None else weights.key_bias[keys]
    weights.value_bias = None if weights.value_bias is None else weights.value_bias[values]
    return weights
