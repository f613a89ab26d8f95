"""What an attention layer computed for a batch of windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headfuse.models.states import capped

CAPTURE = "headfuse_capture"
ReconstructedKeys = Callable[[torch.Tensor], torch.Tensor]
"""Keys `[B, n, T, d]` after RoPE and norms, in the canonical order, as fused heads give them back."""


@dataclass(frozen=True)
class AttentionCapture:
    """What one attention layer computed for a batch of windows.

    Shapes: `query [B, n_q, T, d]`, `key` and `value [B, n_s, T, d]` (after RoPE and norms; channels of queries and keys
    in the canonical order), `output [B, T, n_q, d]` (head outputs before the output projection). `mask` is boolean
    `[1, 1, T, T]`, additive `[1, n_q, T, T]` where heads have biases, or None for plain causal attention;
    `weight` is what one token counts in the layer's statistics; `key_before_norm [B, T, n_s, d]`, where keys have one;
    `softcap` bounds the scores (gemma2); `sinks [n_q]` are the scores of one more place, whose value is zero (gpt_oss);
    `gain [B, T]`: by what a norm behind the output projection multiplies the size of a token's output (olmo2, gemma3).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    weight: float = 1.0
    key_before_norm: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    gain: torch.Tensor | None = None

    def windows(self) -> list[AttentionCapture]:
        """Each window alone."""
        shared = {"mask", "sinks"}
        split = {
            part.name: value.split(1)
            for part in fields(self)
            if isinstance(value := getattr(self, part.name), torch.Tensor) and part.name not in shared
        }
        return [replace(self, **dict(zip(split, parts, strict=True))) for parts in zip(*split.values(), strict=True)]

    @property
    def plain_softmax(self) -> bool:
        """Attention is the softmax of the scores themselves: no cap bounds them, and no sink stands beside them."""
        return self.softcap is None and self.sinks is None

    def attend(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Head outputs `[B, n_q, T, d]`, computed with the given keys and values `[B, n_s, T, d]`."""
        if not self.plain_softmax:
            shares = self.probabilities(key).unflatten(1, (key.shape[1], -1))  # [B, n_s, q, T, T]
            return (shares @ value[:, :, None]).flatten(1, 2)
        return nn.functional.scaled_dot_product_attention(
            self.query,
            key,
            value,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=self.scaling,
            enable_gqa=True,  # query heads of one KV head are adjacent
        )

    def probabilities(self, key: torch.Tensor, step: int = 1) -> torch.Tensor:
        """Attention probabilities `[B, n_q, T', T]` of every `step`-th query, with `key [B, n_s, T, d]`."""
        query, length = self.query[:, :, ::step], key.shape[2]
        batch, heads, queries, d = query.shape
        grouped = query.reshape(batch, key.shape[1], -1, d)
        scores = capped((grouped * self.scaling @ key.mT).view(batch, heads, queries, length), self.softcap)
        if self.mask is not None and self.mask.dtype != torch.bool:
            return self._shares(scores.add_(self.mask[:, :, ::step]))
        allowed = (
            torch.ones(length, length, dtype=torch.bool, device=key.device).tril() if self.mask is None else self.mask
        )[..., ::step, :]
        hidden = torch.zeros_like(allowed, dtype=scores.dtype).masked_fill_(~allowed, float("-inf"))
        return self._shares(scores.add_(hidden))  # ten times as fast as filling the scores of all heads

    def _shares(self, scores: torch.Tensor) -> torch.Tensor:
        """The softmax of scores `[B, n_q, T', T]`, without the share that goes to the sinks."""
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks.to(scores)], dim=-1).softmax(-1)[..., :-1]


class HostCapture(AttentionCapture):
    """A capture that does not fit on the device: its tensors stay on the host and are copied at every use."""

    def __init__(self, capture: AttentionCapture) -> None:
        moved = {name: getattr(capture, name) for name in ("query", "key", "value", "output", "key_before_norm")}
        vars(self).update(
            device=capture.query.device, mask=capture.mask, scaling=capture.scaling, weight=capture.weight,
            softcap=capture.softcap, sinks=capture.sinks, gain=capture.gain,
            host={name: None if tensor is None else tensor.cpu() for name, tensor in moved.items()},
        )  # fmt: skip

    def _up(self, name: str) -> Any:
        tensor = vars(self)["host"][name]
        return None if tensor is None else tensor.to(vars(self)["device"])

    query = property(lambda self: self._up("query"))
    key = property(lambda self: self._up("key"))
    value = property(lambda self: self._up("value"))
    output = property(lambda self: self._up("output"))
    key_before_norm = property(lambda self: self._up("key_before_norm"))


def capturing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA that can record its inputs and outputs; it applies score caps and sinks if the model has them.

    It reads reconstructed keys where the module has `headfuse_keys`, what gives them.
    """
    order: Any = getattr(module, "headfuse_order", None)
    maps: ReconstructedKeys | None = getattr(module, "headfuse_keys", None)
    if maps is not None:
        key = _reconstructed(key, maps, order)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and s_aux is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        whole = AttentionCapture(query, key, value, query, attention_mask, scale, softcap=softcap, sinks=s_aux)
        output = whole.attend(key, value).transpose(1, 2)
    wanted = getattr(module, "headfuse_captures", None)
    if wanted is not None:
        captures, weight, keep = wanted
        before_norm = getattr(module, "headfuse_key", None)
        if before_norm is not None:
            before_norm = before_norm.view(*before_norm.shape[:2], -1, query.shape[-1])
        if order is not None:
            query, key = query[..., order], key[..., order]
            before_norm = None if before_norm is None else before_norm[..., order]
        before_norm = None if before_norm is None else before_norm.float()
        states = query.float(), key.float(), value.float(), output.float()  # whatever layers compute in
        capture = AttentionCapture(*states, attention_mask, scale, weight, before_norm, softcap, s_aux)
        captures.append(keep(capture))
    return output, None


def _reconstructed(key: torch.Tensor, maps: ReconstructedKeys, order: Sequence[int] | None) -> torch.Tensor:
    """Keys `[B, n, T, d]` as fused heads give them back; `order`: of the channels, to make them canonical."""
    if order is None:
        return maps(key.float()).to(key.dtype)
    back = sorted(range(len(order)), key=order.__getitem__)
    return maps(key[..., order].float())[..., back].to(key.dtype)
