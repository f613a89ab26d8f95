"""headfuse: fuse the key and value heads of a causal language model into a smaller KV cache."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_API = {
    "analyze": "headfuse.planning.analysis",
    "evaluate": "headfuse.evaluation.evaluate",
    "fuse": "headfuse.conversion.convert",
    "load_model": "headfuse.models.loading",
    "uptrain": "headfuse.training.uptrain",
}
__all__ = ["__version__", "analyze", "evaluate", "fuse", "load", "uptrain"]


def __getattr__(name: str) -> Any:
    attribute = "load_model" if name == "load" else name
    if attribute not in _API:
        raise AttributeError(f"module 'headfuse' has no attribute {name!r}")
    value = getattr(import_module(_API[attribute]), attribute)
    globals()[name] = value
    return value
