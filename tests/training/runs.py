"""A tiny source, its fused model, and short runs of uptraining."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headfuse.checkpoint.plan_file import write_plan
from headfuse.checkpoint.reader import fingerprint
from headfuse.plan import FusionPlan, HeadLayout, LayerPlan, SourceModel
from headfuse.training.loop import Progress
from headfuse.training.uptrain import UptrainResult, uptrain

WORDS = [f"w{i}" for i in range(40)]
GROUPS = ((0, 1), (2, 3))


def write_tokenizer(folder: Path, words: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def write_source(folder: Path, words: list[str] = WORDS, **options: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words) + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=1, attention_dropout=0.1, **options,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    write_tokenizer(folder, words)
    return folder


def write_fused(source: Path, folder: Path) -> Path:
    """The source with neighbouring heads averaged, and its plan."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            tensors[name] = weight.view(2, 2, 8, -1).float().mean(1).flatten(0, 1).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 2}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A card\n\nMade by fusion.\n")
    (folder / "headfuse.yaml").write_text("budget: {total: 0.5}\n")
    plan = FusionPlan(
        headfuse_version="0", source=SourceModel(name=source.name, fingerprint=fingerprint(source)), layout="gqa",
        heads=HeadLayout(model_type="llama", num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
                         num_key_value_heads=4, head_dim=8),
        method="mean", allocator="uniform", budget="0.5",
        layers=tuple(LayerPlan(layer_idx=i, key_groups=GROUPS, value_groups=GROUPS) for i in range(2)),
    )  # fmt: skip
    write_plan(folder, plan)
    return folder


def train(model: Path, data: str | list[str] | None, **options: Any) -> UptrainResult:
    """Twelve steps of two windows of 16 tokens, checkpoints after 5 and 10."""
    defaults: dict[str, Any] = {
        "tokens": 12 * 32, "batch_size": 2, "sequence_length": 16, "checkpoint_every": 5, "learning_rate": 1e-2,
        "device": "cpu", "threads": 1,
    }  # fmt: skip
    return uptrain(str(model), data=data, **{**defaults, **options})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(folder) if record["event"] == "step"]


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return on_progress


def without_dropout(*folders: Path) -> None:
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
