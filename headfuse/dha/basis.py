"""The basis in which heads are mixed: their own, or that of another method's maps."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from headfuse.fusion import FUSION_METHODS
from headfuse.fusion.moments import key_moments, value_moments
from headfuse.models.attention import AttentionWeights
from headfuse.models.capture import AttentionCapture
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan
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
    arch, heads = streamed.arch, streamed.heads
    windows, starts = streamed.embed(text.statistics), streamed.embed(text.starts, START_WEIGHT)
    for layer in plan.layers:
        tensors, captures = streamed.layer_tensors(layer.layer_idx), list[AttentionCapture]()
        with streamed.layer(layer.layer_idx, tensors) as run:
            windows, starts = run(windows, captures), run(starts, captures)
        own = AttentionWeights.of_layer({n: t.double() for n, t in tensors.items()}, arch, heads)
        maps = FUSION_METHODS[method]
        keys = maps.key_maps(layer.key_groups, key_moments(captures, heads)).read
        values = maps.value_maps(layer.value_groups, value_moments(captures, own.output, heads, None)).read
        length = keys.square().sum(1).sqrt()  # of every channel: maps of keys act on whole rotary planes
        floor = LEAST_SCALE * length.amax(1, keepdim=True)
        keys = torch.where((length > 1e-9)[:, None], keys / length.clamp_min(1e-9)[:, None], _eye_like(keys))
        keys = keys * length.clamp_min(floor)[:, None]
        u, s, v = torch.linalg.svd(values)
        values = u * s.clamp_min(LEAST_SCALE * s.amax(1, keepdim=True))[:, None] @ v
        reads = [heads.source_head(query) for query in range(heads.num_attention_heads)]
        own.query = keys[reads].mT @ own.query
        own.output = torch.einsum("Dhd,hde->Dhe", own.output, values[reads])
        own.key, own.value = torch.linalg.solve(keys, own.key), torch.linalg.solve(values, own.value)
        if own.query_bias is not None:
            own.query_bias = (keys[reads].mT @ own.query_bias[..., None])[..., 0]
        if own.key_bias is not None:
            own.key_bias = torch.linalg.solve(keys, own.key_bias[..., None])[..., 0]
        if own.value_bias is not None:
            own.value_bias = torch.linalg.solve(values, own.value_bias[..., None])[..., 0]
        attention = model.get_submodule(arch.attention_prefix(layer.layer_idx))
        state = {name: tensor.float() for name, tensor in own.to_tensors(arch, heads).items()}
        attention.load_state_dict(state, strict=False)


def _eye_like(maps: torch.Tensor) -> torch.Tensor:
    return torch.eye(maps.shape[-1], dtype=maps.dtype).expand_as(maps)
