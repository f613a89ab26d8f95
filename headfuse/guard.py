"""The end-loss guard: held-out text goes through the layers as they were written, by the class that will load them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headfuse.architectures import Architecture
from headfuse.modeling.modeling_headfuse import HeadfuseAttention
from headfuse.streaming import HiddenStates


class WrittenLayers:
    """The decoder layers of a fused model, one in memory at a time, computed in float32.

    Args:
        config: the fused model's config.json.
        arch: the family's table entry.
        device: where layers are computed.
    """

    def __init__(self, config: Mapping[str, Any], arch: Architecture, device: torch.device) -> None:
        fields = dict(config)
        fused = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(fused, attn_implementation="sdpa", dtype=torch.float32)
        model.eval()
        self.device = device
        self.layers = [model.get_submodule(arch.layer_prefix(i)) for i in range(fused.num_hidden_layers)]

    def run(self, layer_idx: int, tensors: Mapping[str, torch.Tensor], states: HiddenStates) -> HiddenStates:
        """Run hidden states through one written layer (tensor names relative to the layer)."""
        layer = self.layers[layer_idx]
        layer.load_state_dict({k: v.to(self.device, torch.float32) for k, v in tensors.items()}, assign=True)
        for module in layer.modules():
            if isinstance(module, HeadfuseAttention):
                for name, table in list(module.named_buffers(recurse=False)):
                    module.register_buffer(name, torch.empty_like(table, device=self.device), persistent=False)
                module.reset_tables()
        outputs = []
        with torch.no_grad():
            for window in states.hidden:
                result = layer(window[None], **states.kwargs[layer_idx])
                outputs.append(result[0] if isinstance(result, tuple) else result)
        layer.to("meta")
        return replace(states, hidden=torch.cat(outputs))
