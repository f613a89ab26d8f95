"""Recipes, options and their refusals."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from headfuse.config.packaged import packaged
from headfuse.config.uptrain import UptrainConfig, load_recipe
from headfuse.errors import ConfigError, DataError, HeadfuseError, MissingExtraError, OutputError, UnsupportedModelError
from headfuse.models.loading import load_model
from headfuse.training.teacher import check_head
from headfuse.training.uptrain import default_output
from tests.support.tiny_models import tiny_model
from tests.training.runs import WORDS, train, write_tokenizer


def test_packaged_recipes_are_strict_and_run(fused: Path, data: str, tmp_path: Path) -> None:
    names = sorted(packaged("recipes"))
    assert {"recover", "dha", "two-stage", "attention", "lora"} <= set(names)
    defaults = load_recipe(None, {"data": data, "tokens": 1})
    assert load_recipe("recover", {"data": data, "tokens": 1}) == defaults
    for name in names:
        assert load_recipe(name, {"data": data, "tokens": "50M"}).tokens == 50_000_000
    with pytest.raises(ConfigError, match="give a YAML file or a packaged name: attention, dha"):
        load_recipe("recovery", {})


def test_the_yaml_of_the_docs_is_every_option_with_its_default(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/reference/options.md").read_text(encoding="utf-8")
    _, block, _ = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "docs.yaml").write_text(block)
    assert load_recipe(str(tmp_path / "docs.yaml"), {}) == load_recipe(None, {"data": "corpus.jsonl", "tokens": "50M"})
    assert set(yaml.safe_load(block)) == set(UptrainConfig.model_fields)


def test_yaml_under_the_command_line(fused: Path, data: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"tokens: 384\ndata: {{{data}: 2, {data}l: 1}}\nseed: 3\n")
    Path(f"{data}l").write_bytes(Path(data).read_bytes())
    Path(f"{data}l").rename(tmp_path / "more.jsonl")
    recipe = tmp_path / "a.yaml"
    recipe.write_text(recipe.read_text().replace(f"{data}l", str(tmp_path / "more.jsonl")))
    result = train(fused, None, config=str(recipe), tokens=None, seed=4, weight_decay=0.1)
    assert result.data == "text.jsonl=2, more.jsonl=1"
    assert (result.recipe.tokens, result.recipe.seed, result.recipe.weight_decay) == (384, 4, 0.1)
    written = (result.output / "uptrain.yaml").read_text()
    assert str(tmp_path) not in written
    assert load_recipe(str(result.output / "uptrain.yaml"), {"data": result.recipe.data}) == result.recipe
    for bad, message in (
        ("token: 3", "did you mean 'tokens'"),
        ("data: 3", "data: give"),
        ("tokens: 1\ntokens: 2", "twice"),
    ):
        recipe.write_text(bad)
        with pytest.raises(ConfigError, match=message):
            train(fused, None, config=str(recipe))
    with pytest.raises(ConfigError, match="tokens: is missing"):
        train(fused, data, tokens=None)


def test_missing_peft_is_one_clear_error(fused: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="peft is not installed") as caught:
        train(fused, data, train="lora")
    assert "pip install 'headfuse[lora]'" in str(caught.value)


def test_logits_that_the_loss_does_not_know_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=42, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        head_dim=8, num_key_value_heads=4, final_logit_softcapping=0.01,
        bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    write_tokenizer(tmp_path / "gemma2", WORDS)
    model = load_model(tmp_path / "gemma2")
    check_head(model, tmp_path / "gemma2")
    monkeypatch.setattr("headfuse.training.teacher.softcap", lambda config: None)
    with pytest.raises(UnsupportedModelError, match="computes its logits in a way"):
        check_head(model, tmp_path / "gemma2")


def test_logits_that_are_divided_by_any_number_are_known(tmp_path: Path) -> None:
    """Scaled states and scaled logits round otherwise; among many logits some are near 0."""
    config = AutoConfig.for_model(
        "granite", vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, logits_scaling=6.0, bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for dtype in (torch.float32, torch.bfloat16):
        check_head(model.to(dtype), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "opt", "bloom", "gpt_oss"])
def test_families_that_cannot_keep_documents_apart_are_refused(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family)
    options: dict[str, Any] = {"packing": "separate", "loss": "ce", "tokens": 32, "output": tmp_path / "out"}
    if family in ("opt", "bloom", "gpt_oss"):
        with pytest.raises(UnsupportedModelError, match="leave packing at joined"):
            train(model, str(tmp_path / "text.txt"), **options)
    else:
        train(model, str(tmp_path / "text.txt"), **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tokens": 0}, ConfigError, "tokens: must be at least 1, not 0"),
        ({"checkpoint_every": 0}, ConfigError, "checkpoint_every: must be at least 1, not 0"),
        ({"batch_size": 0}, ConfigError, "batch_size: must be at least 1, not 0"),
        ({"batch_size": 49}, ConfigError, "batch_size: one step reads 784 tokens (batch_size 49, gradient_acc"),
        ({"gradient_accumulation": 2**62}, ConfigError, "gradient_accumulation 4,611,686,018,427,387,904"),
        ({"sequence_length": 1}, ConfigError, "sequence_length: must be at least 2, not 1"),
        ({"sequence_length": 65}, ConfigError, "65 is more than the model's context of 64"),
        ({"learning_rate": math.nan}, ConfigError, "learning_rate: must be a finite number, not nan"),
        ({"learning_rate": 0.0}, ConfigError, "learning_rate: must be above 0.0, not 0.0"),
        ({"weight_decay": -1.0}, ConfigError, "weight_decay: must be at least 0.0, not -1.0"),
        ({"loss": "mse"}, ConfigError, "loss: 'mse' is unknown; choose from kl, ce"),
        ({"dtype": "int8"}, ConfigError, "dtype is 'int8'"),
        ({"data": "missing.jsonl"}, DataError, "missing.jsonl: no such file"),
        ({"teacher": "missing"}, HeadfuseError, "missing: no such folder"),
        ({"output": "taken"}, OutputError, "already exists"),
        ({"output": "fused", "overwrite": True}, OutputError, "is a model that this run reads"),
        ({"output": "source", "overwrite": True}, OutputError, "is a model that this run reads"),
    ],
    ids=str,
)
def test_bad_options_leave_nothing(
    fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any], kind: type[HeadfuseError], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    if "output" in options:
        options = {**options, "output": tmp_path / options["output"]}
    before = set(tmp_path.iterdir())
    with pytest.raises(kind) as caught:
        train(fused, **{"data": data, **options})
    assert message in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert default_output(Path(".")) == tmp_path / "model-uptrained"
    assert default_output(tmp_path / "model") == tmp_path / "model-uptrained"
    snapshot = tmp_path / "models--org--name/snapshots/0123"
    snapshot.mkdir(parents=True)
    assert default_output(snapshot) == tmp_path / "model/name-uptrained"
