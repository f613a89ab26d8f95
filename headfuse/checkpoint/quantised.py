"""Recognises quantised weights by the names and dtypes of tensors, even if config.json does not say so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headfuse.errors import UnsupportedModelError

FULL_PRECISION = "convert the full-precision model, then quantise the result"
_CONFIGS = ("quantization_config", "compression_config", "quantization")
_MARKS: dict[str, str] = {
    r"\.g_idx$": "GPTQ",
    r"\.qweight$": "AWQ or GPTQ",
    r"\.weight\.(absmax|nested_absmax|quant_map|quant_state\..+)$": "bitsandbytes (4 bits)",
    r"\.(SCB|weight_format)$": "bitsandbytes (8 bits)",
    r"\.weight_scale(_inv)?$": "fp8 or another format with scales",
    r"\.weight_(packed|shape|zero_point|global_scale)$": "compressed-tensors",
    r"\.(q_invperm|trellis)$": "EXL2 or EXL3",
    r"\.W_q$": "HQQ",
    r"\.(codebooks|codes)$": "AQLM",
    r"\.weight\._(data|scale)$": "quanto",
    r"\._weight_(qdata|scale)$": "torchao",
}
"""Tensor names of quantised layers -> the tool or format that uses them. A cache's `k_scale` is not one of them."""


def refuse_quantised_config(raw: Mapping[str, Any], path: Path) -> None:
    """Raise UnsupportedModelError where config.json says that the weights are quantised."""
    options = next((raw[key] for key in _CONFIGS if raw.get(key)), None)
    if options is not None:
        method = options.get("quant_method") if isinstance(options, dict) else None
        by = f" by {method}" if isinstance(method, str) else ""
        raise UnsupportedModelError(f"the weights are quantised{by}", where=path, fix=FULL_PRECISION)


def refuse_quantised(folder: Path, dtypes: Mapping[str, str]) -> None:
    """Raise UnsupportedModelError for quantised weights, naming the tool or format.

    Args:
        folder: the model's.
        dtypes: of all tensors, as safetensors writes them.
    """
    kind, mark = None, None
    for pattern, name in _MARKS.items():
        mark = next(filter(re.compile(pattern).search, dtypes), None)
        if mark is not None:
            kind = name
            break
    if kind == "AWQ or GPTQ":
        kind = "GPTQ" if (folder / "quantize_config.json").exists() else "AWQ"
    if mark is None:
        scales = [name for name in dtypes if name.endswith(".scales")]
        mark = next((name for name in scales if name.removesuffix("scales") + "biases" in dtypes), None)
        kind = "MLX"
    if mark is None:
        mark = next((name for name, code in dtypes.items() if re.fullmatch(r"F[468]_\w+", code)), None)
        kind = "fp8 or smaller numbers"
    if mark is not None:
        raise UnsupportedModelError(
            f"the weights are quantised by {kind} (tensor {mark})", where=folder, fix=FULL_PRECISION
        )


def refuse_gguf(folder: Path) -> None:
    """Raise UnsupportedModelError where the weights of a folder are a GGUF file alone."""
    file = next((path.name for path in sorted(folder.glob("*.gguf"))), None)
    if file is not None and not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(
            f"the weights are a GGUF file ({file}), a format for llama.cpp",
            where=folder,
            fix="convert the full-precision model in safetensors, then write GGUF with `headfuse export --to gguf`",
        )
