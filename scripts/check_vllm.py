"""How far vLLM takes a folder on a machine without a GPU: its config, its model inspection, its own model code.

    python scripts/check_vllm.py FOLDER ...        (in the environment that scripts/check_vllm.sh makes)

For each folder: `ModelConfig` (config.json, remote code, architecture, registry inspection in a subprocess), then,
where the architecture is one of vLLM's own, the model itself with the folder's weights. Only the attention kernel,
which needs a GPU, is replaced: by torch's scaled_dot_product_attention on the heads that vLLM hands over. The
log-probabilities are compared with those of transformers. Prints one JSON document per folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import vllm.platforms
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # the wheel for GPUs finds no platform without one

from vllm.config import (  # noqa: E402
    CacheConfig,
    CompilationConfig,
    DeviceConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.model_executor.models.registry import ModelRegistry  # noqa: E402


class TorchAttention(nn.Module):
    """vLLM's Attention as its models call it, on one sequence and without a cache."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.head_size, self.scale, self.num_kv_heads = head_size, scale, num_kv_heads

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend; `[tokens, heads * head_size]` each."""
        q, k, v = (x.unflatten(-1, (-1, self.head_size)).transpose(0, 1)[None] for x in (query, key, value))
        assert k.shape[1] == self.num_kv_heads
        output = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return output[0].transpose(0, 1).flatten(1)


def main() -> None:
    """Check every folder of the command line."""
    for index, name in enumerate(sys.argv[1:]):
        folder = Path(name)
        config = ModelConfig(model=str(folder), trust_remote_code=True, dtype="float32", enforce_eager=True)
        document: dict[str, Any] = {"folder": folder.name, "architecture": config.architecture}
        if config.architecture != "TransformersForCausalLM":
            document |= run_model(folder, config, first=index == 0)
        print(json.dumps(document), flush=True)


@torch.no_grad()
def run_model(folder: Path, config: ModelConfig, first: bool) -> dict[str, Any]:
    """KV heads of each layer of vLLM's own model, and how far its log-probabilities are from those of transformers."""
    compilation = CompilationConfig(mode=0, custom_ops=["none"])  # torch's operations instead of CUDA's
    whole = VllmConfig(
        model_config=config, cache_config=CacheConfig(), device_config=DeviceConfig("cpu"),
        compilation_config=compilation,
    )  # fmt: skip
    with set_current_vllm_config(whole):
        if first:
            init_distributed_environment(1, 0, f"file:///tmp/headfuse-{id(whole)}", 0, "gloo")
            initialize_model_parallel(1, 1)
        family, _ = ModelRegistry.resolve_model_cls([config.architecture], config)
        for module in ("llama", "qwen2", "mistral"):
            own = sys.modules.get(f"vllm.model_executor.models.{module}")
            if own is not None:
                own.Attention = TorchAttention  # type: ignore[attr-defined]
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        model = family(vllm_config=whole, prefix="").eval()
        torch.set_default_dtype(previous)
        weights = load_file(folder / "model.safetensors")
        loaded = model.load_weights(weights.items())
        missing = sorted(set(dict(model.named_parameters())) - set(loaded))
        assert not missing, missing
        for layer in model.modules():
            method = getattr(layer, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(layer)
        tokens = torch.arange(1, 25)
        hidden = model(tokens, torch.arange(len(tokens)), None)
        logits = model.compute_logits(hidden).float()[:, : config.get_vocab_size()]
    expected = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    difference = logits.log_softmax(-1) - expected(tokens[None]).logits[0].log_softmax(-1)
    heads = [module.num_kv_heads for module in model.modules() if isinstance(module, TorchAttention)]
    return {"num_kv_heads": heads, "largest_difference_of_log_probabilities": difference.abs().max().item()}


if __name__ == "__main__":
    main()
