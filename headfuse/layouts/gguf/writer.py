"""`gguf`: one file for llama.cpp, of a model with stock attention; per-layer head counts by its architecture `deci`."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headfuse.errors import CheckpointError, HeadfuseError, MissingExtraError, UnsupportedModelError
from headfuse.layouts import layerwise
from headfuse.layouts.gguf.tokenizer import chat_template, tokenizer_keys
from headfuse.layouts.slot_table import is_table
from headfuse.models.heads import head_dim

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GGUFArchitecture:
    """What llama.cpp calls a family, and whether its RoPE pairs neighbouring channels instead of halves."""

    name: str
    interleaved: bool
    biases: bool = True
    """Whether projections may have them."""
    factors: bool = True
    """Whether it reads factors of the rotary frequencies."""


FAMILIES = {
    "llama": GGUFArchitecture("llama", True),
    "mistral": GGUFArchitecture("llama", True),
    "qwen2": GGUFArchitecture("qwen2", False, factors=False),
    "qwen3": GGUFArchitecture("qwen3", False, biases=False, factors=False),
}
PER_LAYER = GGUFArchitecture("deci", True)
"""The one Llama-like architecture of llama.cpp whose head counts may differ by layer."""
TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
"""Types of the matrices; the number is that of `general.file_type`. Vectors are always f32."""
QUANT_BLOCK = 32
"""Numbers that share one scale in q8_0; matrices whose rows are no multiple of this stay f16."""
Shapes = Mapping[str, tuple[int, ...]]
Tensors = Iterable[tuple[str, torch.Tensor]]


def architecture(
    config: PreTrainedConfig, num_key_value_heads: Sequence[int], where: object = None
) -> GGUFArchitecture:
    """The architecture for a model of a family and the head counts of its layers.

    Raises:
        UnsupportedModelError: for families that are not written, and where llama.cpp has no fitting architecture.
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"models of model_type {model_type!r} are not written as GGUF",
            where=where,
            fix=f"supported: {', '.join(FAMILIES)}; for others, convert a folder of layout gqa with llama.cpp's own "
            "convert_hf_to_gguf.py",
        )
    wide = config.num_attention_heads * head_dim(config) != config.hidden_size  # llama.cpp's qwen2 has no such heads
    family, uniform = FAMILIES[model_type], len(set(num_key_value_heads)) == 1
    scaled = not family.factors and rope_factors(config) is not None
    if uniform and not scaled and not (wide and model_type == "qwen2"):
        return family
    if model_type not in layerwise.FAMILIES:
        what, fix = "head counts that differ by layer", "fuse the source with --layout gqa"
        if scaled:
            kind = config.rope_parameters["rope_type"]
            what, fix = "factors of rotary frequencies", f"this model cannot run in llama.cpp with rope_type {kind!r}"
        raise UnsupportedModelError(
            f"llama.cpp has no architecture for model_type {model_type!r} with {what}", where=where, fix=fix
        )
    return PER_LAYER


def require_gguf() -> Any:
    """The `gguf` package.

    Raises:
        MissingExtraError: when it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError(
            "the package gguf is not installed", where="--to gguf", fix='pip install "headfuse[gguf]"'
        ) from None
    return gguf


def write(  # nine parameters: a file is made of a model, a tokenizer and tensors, which come from three places
    path: Path,
    name: str,
    config: PreTrainedConfig,
    num_key_value_heads: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    shapes: Shapes,
    tensors: Tensors,
    file_type: str,
    where: object = None,
) -> None:
    """Write a GGUF file, one tensor in memory at a time.

    Args:
        path: the file.
        name: the model's name in it.
        config: of a stock model of the family, whatever its own number of KV heads.
        num_key_value_heads: KV heads of every layer.
        tokenizer: the model's.
        shapes: of all tensors, by their names in transformers, in the order in which they come.
        tensors: names and tensors.
        file_type: one of TYPES.
        where: the model, for messages.

    Raises:
        UnsupportedModelError: for what llama.cpp does not compute, or a tokenizer that it does not have.
    """
    gguf = require_gguf()
    arch = architecture(config, num_key_value_heads, where)
    keys = tokenizer_keys(tokenizer, config.vocab_size, where)
    writer = gguf.GGUFWriter(None, arch.name)
    _model_keys(writer, gguf, name, arch, config, num_key_value_heads, file_type, where)
    for key, value in keys:
        _add(writer, f"tokenizer.ggml.{key}", value)
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)
    names = _names(gguf, arch, config, shapes, where)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for source, target in names.items():
        kind = _kind(shapes[source], file_type)
        shape, dtype, nbytes = _stored(gguf, shapes[source], kind)
        writer.add_tensor_info(target, shape, dtype, nbytes, gguf.GGMLQuantizationType[kind.upper()])
    heads = _rotated(config, num_key_value_heads)
    try:
        writer.write_header_to_file(path)
        _write_keys(writer, where)
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for source, tensor in tensors:
            if source not in names:
                continue
            if arch.interleaved and source.rpartition(".")[0] in heads:
                tensor = interleave(tensor, heads[source.rpartition(".")[0]])
            writer.write_tensor_data(_encode(gguf, source, tensor, _kind(shapes[source], file_type)))
    finally:
        writer.close()


def _write_keys(writer: Any, where: object) -> None:
    try:
        writer.write_kv_data_to_file()
    except (struct.error, OverflowError, TypeError) as error:
        fix = "restore the model's own config.json and tokenizer"
        raise CheckpointError(f"holds a number that GGUF cannot store ({error})", where=where, fix=fix) from None


def _rotated(config: PreTrainedConfig, num_key_value_heads: Sequence[int]) -> dict[str, int]:
    """The projections whose rows are rotated, with the number of their heads."""
    layers = list(enumerate(num_key_value_heads))
    queries = {f"model.layers.{i}.self_attn.q_proj": config.num_attention_heads for i, _ in layers}
    return queries | {f"model.layers.{i}.self_attn.k_proj": count for i, count in layers}


def interleave(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a projection or bias `[heads d, ..]` as llama.cpp's RoPE has them: pairs (i, i + d/2) side by side."""
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])  # [n, 2, d / 2, ..]
    return halves.transpose(1, 2).reshape(tensor.shape)


def rope_factors(config: PreTrainedConfig) -> Any:
    """What llama.cpp divides the rotary frequencies by, `[d / 2]` as a float32 array.

    The scaling of Llama 3, or one table for all lengths of text (layouts/slot_table.py).
    """
    rope = config.rope_parameters
    if is_table(rope):
        return torch.tensor(rope["short_factor"], dtype=torch.float32).numpy()
    if rope.get("rope_type") != "llama3":
        return None
    d = head_dim(config)
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    periods = old * frequencies / (2 * math.pi)  # in the original context
    smooth = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).numpy()


def _model_keys(
    writer: Any,
    gguf: Any,
    name: str,
    arch: GGUFArchitecture,
    config: PreTrainedConfig,
    num_key_value_heads: Sequence[int],
    file_type: str,
    where: object,
) -> None:
    d = head_dim(config)
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"hidden_act is {config.hidden_act!r}, and llama.cpp computes silu for this family",
            where=where,
            fix="this model cannot run in llama.cpp",
        )
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    uniform = len(set(num_key_value_heads)) == 1
    writer.add_name(name)
    writer.add_file_type(TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(config.max_position_embeddings, window))  # llama.cpp attends to all of it
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(num_key_value_heads[0] if uniform else list(num_key_value_heads))
    writer.add_key_length(d)
    writer.add_value_length(d)
    writer.add_rope_dimension_count(d)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type") or "default"
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3") and not is_table(rope):
        raise UnsupportedModelError(
            f"rope_type {kind!r} is not written as GGUF", where=where, fix="default, linear and llama3 are"
        )


def _names(
    gguf: Any, arch: GGUFArchitecture, config: PreTrainedConfig, shapes: Shapes, where: object
) -> dict[str, str]:
    """The name of every tensor in the GGUF file."""
    names_of = gguf.get_tensor_name_map(_arch_enum(gguf, arch.name), config.num_hidden_layers)
    names = dict[str, str]()
    for source in shapes:
        target = names_of.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None or (source.endswith(".bias") and not arch.biases):
            raise UnsupportedModelError(
                f"llama.cpp's architecture {arch.name} has no tensor like {source}",
                where=where,
                fix="this model cannot run in llama.cpp",
            )
        names[source] = target
    return names


def _arch_enum(gguf: Any, name: str) -> Any:
    return next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)


def _kind(shape: tuple[int, ...], file_type: str) -> str:
    if len(shape) < 2:
        return "f32"
    return "f16" if file_type == "q8_0" and shape[-1] % QUANT_BLOCK else file_type


def _stored(gguf: Any, shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], Any, int]:
    """Shape, dtype and bytes of the array that `_encode` returns."""
    import numpy as np

    dtype: Any = {"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}[kind]
    stored = gguf.quants.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType.Q8_0) if kind == "q8_0" else shape
    return stored, dtype, math.prod(stored) * np.dtype(dtype).itemsize


def _encode(gguf: Any, name: str, tensor: torch.Tensor, kind: str) -> Any:
    array = tensor.to("cpu", torch.float16 if kind == "f16" else torch.float32).contiguous()
    if not torch.isfinite(array).all():
        raise HeadfuseError(f"tensor {name} is beyond the range of f16", where="--type", fix="write f32")
    return gguf.quants.quantize(array.numpy(), gguf.GGMLQuantizationType.Q8_0) if kind == "q8_0" else array.numpy()


def _add(writer: Any, key: str, value: Any) -> None:
    """One key of the tokenizer, by the type of its value."""
    add: Callable[[str, Any], None] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        list: writer.add_array,
    }[type(value)]
    add(key, value)
