"""The names that options take, written once for YAML, command line and Python. Imports nothing of the package."""

from __future__ import annotations

from typing import Any, Literal, get_args

Method = Literal["mean", "first", "align", "subspace", "dha"]
"""Names in FUSION_METHODS."""
Allocator = Literal["auto", "uniform", "dha-greedy", "sensitivity", "shrinkage", "taylor", "shapley"]
"""Names in ALLOCATORS."""
Grouping = Literal["cluster", "neighbours", "anneal"]
"""Names in GROUPERS."""
Layout = Literal["decoupled", "layerwise", "gqa", "latent"]
"""Names in LAYOUTS."""
SHARED_PARTITION: tuple[Layout, ...] = ("layerwise", "gqa")
"""Layouts whose keys and values share one partition of a layer's heads, into groups of one size; as in LAYOUTS."""
ONE_COUNT: tuple[Layout, ...] = ("gqa",)
"""Layouts with the same number of heads in every layer; as in LAYOUTS."""
WIDE: tuple[Layout, ...] = ("latent",)
"""Layouts whose fused heads have widths of their own and serve whole groups of source heads; as in LAYOUTS."""
ONE_WIDTH: tuple[Layout, ...] = ("gqa",)
"""Layouts whose heads may have another width than the source's, one for the whole model; as in LAYOUTS."""
Preset = Literal["fast", "balanced", "best"]
"""Names in PRESETS."""
Runtime = Literal["transformers", "vllm", "llama.cpp", "sglang"]
"""Names in LAYOUT_FOR."""
DEFAULT_LAYOUTS: tuple[Layout, ...] = ("latent", "decoupled")
"""Where no layout is given, the first that goes with the model and the other options (planning/layout_choice.py)."""
LAYOUT_FOR: dict[str, tuple[Layout, ...]] = {
    "transformers": ("latent", "decoupled", "layerwise", "gqa"),
    "vllm": ("latent", "decoupled", "layerwise", "gqa"),
    "llama.cpp": ("gqa", "layerwise"),
    "sglang": ("gqa",),
}
"""The layouts that a runtime loads; `--for RUNTIME` picks the first that goes with the model and the other options."""
ONE_HEAD: dict[str, tuple[Layout, ...]] = {"vllm": ("decoupled", "latent")}
"""Layouts for which a runtime caches a single head in each layer, with key and value equally wide."""
Target = Literal["gqa", "layerwise", "gguf"]
"""What `export` writes."""
FileType = Literal["f16", "f32", "q8_0"]
"""Numbers in a GGUF file; names in TYPES of layouts/gguf."""
Device = Literal["auto", "cpu", "cuda", "mps"]
Placement = Literal["auto", "resident", "streamed", "host"]
"""Which weights stay on a device between two uses; `models/placement.py` explains each."""
ComputeDtype = Literal["float32", "bfloat16"]
"""Dtypes of matrix products inside the layers of a conversion; sums and closed forms keep their own."""
Dtype = Literal["float32", "float16", "bfloat16"]
"""Dtypes of written weights; names in DTYPE_NAMES."""
CacheDtype = Literal["fp8", "int8", "int4", "int3", "int2"]
"""Numbers of a simulated KV cache."""
RulerTask = Literal["niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe"]
"""Names in PUZZLES of evaluation/ruler_prompts."""
Loss = Literal["kl", "ce"]
Trained = Literal["all", "attention", "lora"]
"""What `uptrain` trains."""
Packing = Literal["joined", "separate"]
"""Whether documents in a window see each other."""
StartingBasis = Literal["raw", "align", "subspace"]
"""The basis in which method `dha` mixes heads."""
Side = Literal["key", "value"]


def names(choice: Any) -> tuple[str, ...]:
    """The names of one of these types."""
    return get_args(choice)
