"""One table of rotary frequencies for a whole stock model, as the `longrope` scaling that transformers reads.

`longrope` divides each stock frequency by a factor of its own. So any table of frequencies, with repeats too, can be
written as such factors, equal for short and long texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headfuse.errors import UnsupportedModelError
from headfuse.models.rope import STATIC, frequencies, stock_frequencies

FAMILIES = (
    "cohere", "gemma", "granite", "llama", "mistral", "mixtral", "olmo", "qwen2", "qwen2_moe", "starcoder2",
)  # fmt: skip
"""Families whose stock class takes `head_dim` and `longrope` from its config, and has no norm behind its keys."""
CONSTANT_SCALE = ("granite",)
"""Families whose config holds the scale of the scores; that of the others is 1 / sqrt(head_dim)."""


def check(config: Any) -> None:
    """Refuse a model whose stock class cannot have heads of another width.

    Raises:
        UnsupportedModelError: naming the layout that can.
    """
    from headfuse.modeling.configuration_family import has_norm

    rope, reason = getattr(config, "rope_parameters", None) or {}, None
    kind = rope.get("rope_type") or "default"
    if config.model_type not in FAMILIES:
        reason = f"the stock class of model_type {config.model_type!r} has one width of heads"
    elif has_norm(config):
        reason = f"model_type {config.model_type!r} has a norm behind its key projection"
    elif getattr(config, "clip_qkv", None) is not None:
        reason = f"model_type {config.model_type!r} clamps its keys and values (clip_qkv), which rules out mixing heads"
    elif kind not in STATIC:
        reason = f"the frequencies of rope_type {kind!r} depend on the length of the text"
    elif frequencies(config)[1] != 1.0:
        reason = f"rope_type {kind!r} scales queries and keys, and with a table runtimes apply that scale differently"
    if reason is not None:
        raise UnsupportedModelError(
            f"heads of another width do not fit: {reason}", where="--head-dim",
            fix="leave it out, or choose --layout latent",
        )  # fmt: skip


def with_slot_table(raw: dict[str, Any], config: Any, slots: Sequence[int]) -> dict[str, Any]:
    """A config.json whose heads have one rotary plane for each of `slots`, of the frequency that it names.

    Args:
        raw: config.json of the source.
        config: the same as transformers loads it.
        slots: planes of the source, in rising order.
    """
    (own, _), width, theta = frequencies(config), 2 * len(slots), config.rope_parameters["rope_theta"]
    result = {**raw, "head_dim": width}
    if list(slots) == list(range(len(own))):
        return result
    stock = stock_frequencies(theta, width)
    factors = [base / own[slot] for base, slot in zip(stock, slots, strict=True)]
    positions = config.max_position_embeddings
    scaling = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": positions,
        "attention_factor": 1.0,
        "factor": 1.0,
    }
    if "rope_parameters" in raw:
        return {**result, "rope_parameters": {"rope_theta": theta, **scaling}}
    return {**result, "rope_theta": theta, "rope_scaling": scaling}


def is_table(rope_parameters: Mapping[str, Any]) -> bool:
    """Whether RoPE parameters are a table as `with_slot_table` writes it: the same at every length of text."""
    short, long = (rope_parameters.get(f"{name}_factor") for name in ("short", "long"))
    scale = rope_parameters.get("attention_factor")
    return rope_parameters.get("rope_type") == "longrope" and short == long and scale == 1.0
