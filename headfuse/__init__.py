"""headfuse: fuse the key and value heads of a causal language model into a smaller KV cache."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_API = {
    "evaluate": ("headfuse.evaluate", "evaluate"),
    "load": ("headfuse.loading", "load_model"),
    "uptrain": ("headfuse.uptrain", "uptrain"),
}
__all__ = ["__version__", "evaluate", "load", "uptrain"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'headfuse' has no attribute {name!r}")
    module, attribute = _API[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value
