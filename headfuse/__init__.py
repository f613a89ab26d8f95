"""headfuse: fuse the key and value heads of a causal language model into a smaller KV cache."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_API = {
    "EvalConfig": "headfuse.config.evaluate",
    "FuseConfig": "headfuse.config.fuse",
    "FusionPlan": "headfuse.plan",
    "UptrainConfig": "headfuse.config.uptrain",
    "analyze": "headfuse.planning.analysis",
    "evaluate": "headfuse.evaluation.evaluate",
    "export": "headfuse.conversion.export",
    "fuse": "headfuse.conversion.convert",
    "load_model": "headfuse.models.loading",
    "report": "headfuse.reporting.written",
    "uptrain": "headfuse.training.uptrain",
}
"""Name -> module, imported when the name is first used: `import headfuse` loads no torch."""
__all__ = [
    "EvalConfig", "FuseConfig", "FusionPlan", "UptrainConfig", "__version__", "analyze", "evaluate", "export", "fuse",
    "load", "report", "uptrain",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    attribute = "load_model" if name == "load" else name
    if attribute not in _API:
        raise AttributeError(f"module 'headfuse' has no attribute {name!r}")
    value = getattr(import_module(_API[attribute]), attribute)
    globals()[name] = value
    return value
