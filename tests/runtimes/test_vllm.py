"""What vLLM generates from each layout by its own scheduler, paged KV cache and attention, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headfuse.modeling.configuration_family import FAMILIES
from tests.support.commands import fuse
from tests.support.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
VLLM = Path(os.environ.get("HEADFUSE_VLLM", ROOT / ".venv/vllm"))
HEAD_DIM = 32  # the smallest that vLLM's attention for CPUs has
BYTES = 4  # of a number, in float32
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (VLLM / "bin/python").exists(), reason="no environment with vLLM: ./scripts/check_vllm.sh makes it"
    ),
]


@dataclass(frozen=True)
class Folder:
    """A folder that the command makes, and what vLLM has to say of it."""

    family: str
    layout: str
    options: str
    """Of headfuse.yaml; none for the source itself."""
    architecture: str
    channels: tuple[int, ...]
    """Numbers that a token takes in the cache of each layer."""
    empty: int = 0
    """Numbers that a token takes in places of its blocks that no layer has."""


def heads(*counts: int) -> tuple[int, ...]:
    """Channels of so many key heads and as many value heads in each layer."""
    return tuple(2 * count * HEAD_DIM for count in counts)


LAYERWISE = "budget: {key_heads: [2, 4, 1], value_heads: [2, 4, 1]}"
DECOUPLED = "budget: {key_heads: [2, 4, 1], value_heads: [3, 1, 2]}"
LATENT = "budget: {total: {key: 0.75, value: 0.5}, allocator: uniform, keep_layers: [1]}"  # 80 and 32 channels, or all
BY_TRANSFORMERS = "TransformersForCausalLM"  # vLLM's backend for transformers' models
WIDE = (80, 128, 80)
MIXED = ("cohere2", "cwm", "exaone4", "gemma2", "gemma3_text", "ministral", "olmo3", "vaultgemma")
"""Families with windows in some layers: a layer whose 3 heads do not divide the largest one's 4 is padded to it."""
FOLDERS = {
    "source": Folder("llama", "gqa", "", "LlamaForCausalLM", heads(4, 4, 4)),
    "gqa": Folder("llama", "gqa", "budget: {total: 0.5}", "LlamaForCausalLM", heads(2, 2, 2)),
    "gqa-wide": Folder("llama", "gqa", "budget: {total: 0.5, head_dim: 64}", "LlamaForCausalLM", (128, 128, 128)),
    "layerwise": Folder("llama", "layerwise", LAYERWISE, "DeciLMForCausalLM", heads(2, 4, 1)),
    "layerwise-qwen2": Folder("qwen2", "layerwise", LAYERWISE, "DeciLMForCausalLM", heads(2, 4, 1)),
    # one wide head in each layer, whose keys and values are as wide as the wider of both
    **{
        f"decoupled-{family}": Folder(
            family, "decoupled", DECOUPLED, BY_TRANSFORMERS, heads(4, 4, 2) if family in MIXED else heads(3, 4, 2)
        )
        for family, entry in FAMILIES.items()
        if entry.not_in_vllm is None
    },
    **{
        f"latent-{family}": Folder(family, "latent", LATENT, BY_TRANSFORMERS, tuple(2 * width for width in WIDE))
        for family in ("llama", "mistral", "qwen2", "gpt2", "phi", "qwen3", "olmo2")
    },
    # three layers with windows and two without: two blocks with two places for the three
    "source-five-layers": Folder("gemma3_text", "gqa", "", "Gemma3ForCausalLM", heads(4, 4, 4, 4, 4), 2 * 4 * HEAD_DIM),
    "gqa-five-layers": Folder(
        "gemma3_text", "gqa", "budget: {total: 0.5}", "Gemma3ForCausalLM", heads(2, 2, 2, 2, 2), 2 * 2 * HEAD_DIM
    ),
    "decoupled-five-layers": Folder(
        "gemma3_text",
        "decoupled",
        "budget: {key_heads: [2, 2, 2, 2, 2], value_heads: [1, 2, 1, 2, 2]}",
        BY_TRANSFORMERS,
        heads(2, 2, 2, 2, 2),
        2 * 2 * HEAD_DIM,
    ),
    "latent-gemma2": Folder("gemma2", "latent", LATENT, BY_TRANSFORMERS, (256, 256, 256)),
}
REFUSED = {
    family: Folder(family, "decoupled", DECOUPLED, "", ())
    for family, entry in FAMILIES.items()
    if entry.not_in_vllm is not None
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What scripts/check_vllm.py says of every folder; one process for all, as importing vLLM takes long."""
    home, paths, said = tmp_path_factory.mktemp("vllm"), {}, {}
    for name, folder in {**FOLDERS, **REFUSED}.items():
        layers = len(folder.channels) or 3
        model = home / "sources" / f"{folder.family}-{layers}" / "model"
        if not model.exists():
            tiny_model(model, folder.family, layers=layers, head_dim=HEAD_DIM)
            if folder.family == "qwen2":
                without_windows(model)
        paths[name] = model
        if folder.options:
            (home / "options.yaml").write_text(f"{folder.options}\nlayout: {folder.layout}\npreset: fast\n")
            paths[name] = home / name
            said[name] = fuse(model, paths[name], "--config", home / "options.yaml")["kv_bytes_per_token_in"]["vllm"]
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "LD_PRELOAD": str(VLLM / "lib/libiomp5.so")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [VLLM / "bin/python", ROOT / "scripts/check_vllm.py", *paths.values()],
        cwd=home, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    documents = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {name: {**document, "said": said.get(name)} for name, document in zip(paths, documents, strict=True)}


def without_windows(model: Path) -> None:
    """Layout layerwise is for models that attend to all tokens."""
    config = json.loads((model / "config.json").read_text())
    config.update(sliding_window=None, use_sliding_window=False)
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", FOLDERS)
def test_vllm_generates_what_transformers_does(served: dict[str, dict[str, Any]], name: str) -> None:
    document = served[name]
    assert "refused" not in document, document["refused"]
    assert document["architecture"].replace("MoE", "") == FOLDERS[name].architecture
    model = AutoModelForCausalLM.from_pretrained(document["folder"], dtype=torch.float32, trust_remote_code=True)
    texts = zip(document["prompts"], document["tokens"], document["log_probabilities"], strict=True)
    for prompt, tokens, log_probabilities in texts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(log_probabilities), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FOLDERS)
def test_vllm_allocates_what_each_layer_keeps(served: dict[str, dict[str, Any]], name: str) -> None:
    folder, document = FOLDERS[name], served[name]
    assert document["cache_bytes"] == [BYTES * channels for channels in folder.channels]
    assert document["cache_bytes_together"] == BYTES * (sum(folder.channels) + folder.empty)
    assert document["said"] in (None, document["cache_bytes_together"]), "`fuse` says what vLLM allocates"


@pytest.mark.parametrize("name", REFUSED)
def test_the_model_code_refuses_what_vllm_cannot_run(served: dict[str, dict[str, Any]], name: str) -> None:
    assert f"does not run {name}: {FAMILIES[name].not_in_vllm}" in served[name]["refused"]
