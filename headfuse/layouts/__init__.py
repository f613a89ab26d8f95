"""LAYOUTS: how a fused model lies on disk, and which runtimes load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headfuse.architectures import AttentionWeights
from headfuse.layouts import decoupled, gqa
from headfuse.plan import FusionPlan, LayerPlan


@dataclass(frozen=True)
class LayoutFormat:
    """The config.json of a layout, the order of its heads, and the runtimes that load it."""

    config: Callable[[dict[str, Any], FusionPlan], dict[str, Any]]
    arrange: Callable[[AttentionWeights, LayerPlan, FusionPlan], AttentionWeights]
    runtimes: str
    free_slots: bool = False
    """Fused key heads may choose which frequencies their rotary slots carry."""


LAYOUTS: dict[str, LayoutFormat] = {
    "decoupled": LayoutFormat(
        decoupled.config,
        decoupled.arrange,
        "transformers (import headfuse.modeling, or trust_remote_code=True)",
        True,
    ),
    "gqa": LayoutFormat(gqa.config, gqa.arrange, "transformers, vLLM, SGLang, TensorRT-LLM, llama.cpp (stock class)"),
}
LAYOUT_FOR = {"transformers": "decoupled", "vllm": "gqa", "llama.cpp": "gqa", "sglang": "gqa"}
"""The layout that `--for RUNTIME` picks."""
