"""The basis in which heads are mixed: their own, or that of another method's maps."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from headfuse.fusion import FUSION_METHODS
from headfuse.fusion.moments import key_moments, value_moments
from headfuse.models.attention import AttentionWeights
from headfuse.models.placement import factories_on
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan, HeadLayout
from headfuse.text.calibration import START_WEIGHT, CalibrationText

LEAST_SCALE = 0.1
"""Channels of another basis are at least this large relative to the largest, so that the basis can be undone."""


@torch.no_grad()
def rebase(
    model: PreTrainedModel, streamed: StreamedModel, plan: FusionPlan, text: CalibrationText, method: str
) -> None:
    """Turn every head into the basis that another method's read maps give, which changes no output.

    The source's head is R fused in that method, so R^-1 source are heads that may be averaged.
    """
    arch, heads, text = streamed.arch, streamed.heads, text.fitted
    maps = FUSION_METHODS[method]
    for layer in streamed.walk([streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)]):
        own, captures, groups = layer.weights.double(), layer.captures, plan.layers[layer.index]
        with factories_on(streamed.device):
            keys = maps.key_maps(groups.key_groups, key_moments(captures, heads)).read
            values = maps.value_maps(groups.value_groups, value_moments(captures, own.output, heads, None)).read
            turned = _turned(own, _invertible_keys(keys), _invertible_values(values), heads)
        attention = model.get_submodule(arch.attention_prefix(layer.index))
        state = {name: tensor.float() for name, tensor in turned.to_tensors(arch, heads).items()}
        attention.load_state_dict(state, strict=False)


def _invertible_keys(keys: torch.Tensor) -> torch.Tensor:
    """Maps of keys `[n, d, d]`, which act on whole rotary planes, with no channel shorter than LEAST_SCALE."""
    length = keys.square().sum(1).sqrt()  # of every channel
    floor = LEAST_SCALE * length.amax(1, keepdim=True)
    keys = torch.where((length > 1e-9)[:, None], keys / length.clamp_min(1e-9)[:, None], _eye_like(keys))
    return keys * length.clamp_min(floor)[:, None]


def _invertible_values(values: torch.Tensor) -> torch.Tensor:
    """Maps of values `[n, d, d]` with no singular value below LEAST_SCALE."""
    u, s, v = torch.linalg.svd(values)
    return u * s.clamp_min(LEAST_SCALE * s.amax(1, keepdim=True))[:, None] @ v


def _turned(own: AttentionWeights, keys: torch.Tensor, values: torch.Tensor, heads: HeadLayout) -> AttentionWeights:
    """Weights with keys and values in the bases `[n, d, d]`, and the projections that read them turned back."""
    reads = [heads.source_head(query) for query in range(heads.num_attention_heads)]
    queries, key, value = own.query_bias, own.key_bias, own.value_bias
    return replace(
        own,
        query=keys[reads].mT @ own.query,
        output=torch.einsum("Dhd,hde->Dhe", own.output, values[reads]),
        key=torch.linalg.solve(keys, own.key),
        value=torch.linalg.solve(values, own.value),
        query_bias=None if queries is None else (keys[reads].mT @ queries[..., None])[..., 0],
        key_bias=None if key is None else torch.linalg.solve(keys, key[..., None])[..., 0],
        value_bias=None if value is None else torch.linalg.solve(values, value[..., None])[..., 0],
    )


def _eye_like(maps: torch.Tensor) -> torch.Tensor:
    return torch.eye(maps.shape[-1], dtype=maps.dtype).expand_as(maps)
