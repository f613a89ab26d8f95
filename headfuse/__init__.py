"""headfuse: fuse the key and value heads of a causal language model into a smaller KV cache."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_API = {
    "analyze": ("headfuse.analysis", "analyze"),
    "evaluate": ("headfuse.evaluate", "evaluate"),
    "fuse": ("headfuse.convert", "fuse"),
    "load": ("headfuse.loading", "load_model"),
    "uptrain": ("headfuse.uptrain", "uptrain"),
}
__all__ = ["__version__", "analyze", "evaluate", "fuse", "load", "uptrain"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'headfuse' has no attribute {name!r}")
    import_module(_API[name][0])
    for known, (module, attribute) in _API.items():  # importing a module of this package hides a function of its name
        if module in sys.modules and hasattr(sys.modules[module], attribute):
            globals()[known] = getattr(sys.modules[module], attribute)
    return globals()[name]
