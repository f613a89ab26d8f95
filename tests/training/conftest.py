"""A tiny source, its fused models, and their text."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from headfuse.modeling import HeadfuseConfig, HeadfuseForCausalLM
from tests.training.runs import WORDS, write_fused, write_source, write_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def fused(source: Path, tmp_path: Path) -> Path:
    return write_fused(source, tmp_path / "fused")


@pytest.fixture
def decoupled(source: Path, tmp_path: Path) -> Path:
    config = HeadfuseConfig(
        source_config=LlamaConfig.from_pretrained(source), num_key_heads=[2, 1], num_value_heads=[1, 3],
        key_head_of_query=[[0, 1, 1, 0], [0] * 4], value_head_of_query=[[0] * 4, [0, 1, 1, 2]],
        rotary_slots=[[[0, 1, 1, 2], [0, 0, 2, 3]], None],
    )  # fmt: skip
    torch.manual_seed(0)
    HeadfuseForCausalLM(config).save_pretrained(tmp_path / "decoupled")
    write_tokenizer(tmp_path / "decoupled", WORDS)
    return tmp_path / "decoupled"


@pytest.fixture
def data(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "text.jsonl"
    with path.open("w") as stream:
        for _ in range(60):
            words = torch.randint(0, len(WORDS), (40,), generator=generator).tolist()
            stream.write(json.dumps({"text": " ".join(WORDS[i] for i in words)}) + "\n")
    return str(path)
