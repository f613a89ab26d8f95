"""Text decoders of models that see images: taken out, fused, put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from text_decoder import put, take
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from headfuse.errors import CheckpointError, UnsupportedModelError
from headfuse.models.config import read_config
from tests.support.commands import fuse
from tests.support.model_outputs import logits
from tests.support.planted_heads import plant
from tests.support.tiny_models import FAMILY_OPTIONS, VOCABULARY, tiny_model

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "depth": 1, "embed_dim": 16, "num_heads": 2, "out_hidden_size": 64,
}  # fmt: skip
OPTIONS = {
    **FAMILY_OPTIONS,
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
}
MORE = ("internvl", "llava", "qwen3_vl", "smolvlm")
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip


def vision_model(folder: Path, model_type: str) -> Path:
    """A tiny random model that sees images, with a tokenizer."""
    torch.manual_seed(0)
    kinds: Any = AutoConfig.for_model(model_type)
    text = {**TEXT, **OPTIONS.get(kinds.text_config.model_type, {}), "model_type": kinds.text_config.model_type}
    vision = {**VISION, "model_type": kinds.vision_config.model_type}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model(folder.parent / "tokens")).save_pretrained(folder)
    return folder


def text_logits(folder: Path) -> torch.Tensor:
    """As `logits`, of a model that sees images."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=tokens).logits
    return result


@pytest.mark.parametrize(
    "model_type", ["gemma3", "qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]
)
def test_the_decoder_is_fused_and_the_rest_is_copied(tmp_path: Path, model_type: str) -> None:
    model = vision_model(tmp_path / "model", model_type)
    take(model, tmp_path / "decoder")
    torch.testing.assert_close(logits(tmp_path / "decoder"), text_logits(model), rtol=1e-4, atol=1e-4)
    put(tmp_path / "decoder", model, tmp_path / "same")
    source, same = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "same"))
    assert source.keys() == same.keys()
    assert all(torch.equal(source[name], same[name]) for name in source)

    plant(tmp_path / "decoder", [[0, 3], [1, 2]])
    put(tmp_path / "decoder", model, tmp_path / "planted")
    fuse(tmp_path / "decoder", tmp_path / "fused", "--budget", "1/2", "--layout", "gqa", "--preset", "fast")
    put(tmp_path / "fused", tmp_path / "planted", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").get_text_config().num_key_value_heads == 2
    torch.testing.assert_close(text_logits(tmp_path / "out"), text_logits(tmp_path / "planted"), rtol=1e-4, atol=1e-4)
    out, vision = load_file(tmp_path / "out/model.safetensors"), [n for n in source if "vision" in n or "visual" in n]
    assert vision
    assert all(torch.equal(source[name], out[name]) for name in vision)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = vision_model(tmp_path / "model", "llava")
    with pytest.raises(UnsupportedModelError, match="LlavaForConditionalGeneration sees images"):
        read_config(model)
    with pytest.raises(UnsupportedModelError, match="its text decoder is of model_type 'llama'"):
        take(tmp_path / "tokens", tmp_path / "out")
    both_ways = vision_model(tmp_path / "both_ways", "paligemma")
    with pytest.raises(UnsupportedModelError, match="attends in both directions"):
        take(both_ways, tmp_path / "out")
    with pytest.raises(CheckpointError, match="the decoder of model has another hidden_size"):
        put(tmp_path / "tokens", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
