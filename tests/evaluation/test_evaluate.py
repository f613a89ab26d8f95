import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from headfuse.checkpoint.reader import Checkpoint
from headfuse.cli.app import app
from headfuse.cli.eval import render
from headfuse.config.command import EVALUATE
from headfuse.errors import CheckpointError, ConfigError, DataError, HeadfuseError
from headfuse.evaluation import passkey
from headfuse.evaluation.capacity import stored_dtype
from headfuse.evaluation.evaluate import evaluate
from headfuse.evaluation.perplexity import nll_per_window
from headfuse.layouts.folder import kv_bytes_per_token
from headfuse.modeling import HeadfuseConfig, HeadfuseForCausalLM
from headfuse.models.loading import load_model
from tests.support.tiny_models import tiny_model

WORDS = [f"w{i}" for i in range(40)]


def write_tokenizer(folder: Path, words: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def llama_config(**options: Any) -> LlamaConfig:
    defaults: dict[str, Any] = {
        "vocab_size": 42, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": None,
        "eos_token_id": 1,
    }  # fmt: skip
    return LlamaConfig(**{**defaults, **options})


def write_model(folder: Path, words: list[str] = WORDS, dtype: torch.dtype = torch.float16, **options: Any) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(**options)).to(dtype).save_pretrained(folder)
    write_tokenizer(folder, words)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> str:
    ids = torch.randint(0, len(WORDS), (50, 20), generator=torch.Generator().manual_seed(0))
    lines = [json.dumps({"text": " ".join(WORDS[i] for i in row)}) for row in ids.tolist()]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "text.jsonl")


def test_nll_equals_the_loss_of_transformers(model: Path) -> None:
    loaded, windows = load_model(model, device="cpu"), torch.randint(0, 42, (5, 16))
    losses = nll_per_window(loaded, windows)
    assert losses.dtype == torch.float64
    for window, loss in zip(windows, losses, strict=True):
        assert loss.item() == pytest.approx(loaded(window[None], labels=window[None]).loss.item(), rel=1e-5)


def test_the_mode_of_training_is_kept(model: Path) -> None:
    loaded = load_model(model, device="cpu").train()
    nll_per_window(loaded, torch.randint(0, 42, (2, 16)))
    assert loaded.training


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model: Path, data: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = evaluate(str(model), data=data, samples=4, sequence_length=16, device="cpu")
    assert result.model.perplexity == pytest.approx(42)
    assert result.model.nll_stderr == pytest.approx(0, abs=1e-6)


def test_figures_and_protocol(model: Path, data: str) -> None:
    result = evaluate(str(model), data=data, samples=4, sequence_length=16, device="cpu")
    assert (result.windows, result.sequence_length, result.predictions) == (4, 16, 60)
    assert result.model.name == "model"
    assert result.data == "text.jsonl"
    assert result.baseline is result.comparison is None
    assert result.model.perplexity == pytest.approx(math.exp(result.model.nll))
    assert result.model.parameters == sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert result.model.kv_dtype == "float16"
    assert result.model.kv_bytes_per_token == 2 * 3 * 2 * 8 * 2
    for words in ("first 4 independent", "16 tokens", "joined by EOS", "without BOS", "15 predictions"):
        assert words in result.protocol
    assert json.loads(json.dumps(result.to_dict()))["model"]["nll"] == result.model.nll


def test_nll_is_that_of_the_first_windows_of_the_text(model: Path, data: str) -> None:
    documents = [json.loads(line)["text"].split() for line in Path(data).read_text().splitlines()]
    ids = [i for document in documents for i in [1, *(WORDS.index(word) + 2 for word in document)]][1:]
    windows = torch.tensor(ids[:64]).view(4, 16)
    losses = nll_per_window(load_model(model, device="cpu"), windows)
    result = evaluate(str(model), data=data, samples=4, sequence_length=16, device="cpu")
    assert result.model.nll == pytest.approx(losses.mean().item())
    assert result.model.nll_stderr == pytest.approx(losses.std().item() / 2)


def test_comparison_with_itself_is_neutral(model: Path, data: str) -> None:
    result = evaluate(str(model), data=data, baseline=str(model), samples=4, sequence_length=16, device="cpu")
    assert result.comparison is not None
    assert (result.comparison.kv_ratio, result.comparison.ppl_ratio, result.comparison.nll_gap) == (1, 1, 0)
    assert result.comparison.nll_gap_stderr == 0


def test_comparison_with_a_larger_cache(model: Path, data: str, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", num_key_value_heads=4, dtype=torch.float32)
    result = evaluate(str(model), data=data, baseline=str(other), samples=4, sequence_length=16, device="cpu")
    assert result.baseline is not None
    assert result.comparison is not None
    assert result.baseline.kv_bytes_per_token == 4 * result.model.kv_bytes_per_token
    assert result.comparison.kv_ratio == 0.25
    assert result.comparison.nll_gap == pytest.approx(result.model.nll - result.baseline.nll)
    assert result.comparison.ppl_ratio == pytest.approx(math.exp(result.comparison.nll_gap))


def decoupled() -> HeadfuseConfig:
    return HeadfuseConfig(
        source_config=llama_config(),
        num_key_heads=[1, 2, 2], num_value_heads=[2, 1, 1],
        key_head_of_query=[[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]],
        value_head_of_query=[[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (llama_config(), 2 * 3 * 2 * 8),
        (llama_config(head_dim=16, num_key_value_heads=None), 2 * 3 * 4 * 16),
        (decoupled(), (5 + 4) * 8),
    ],
    ids=["gqa", "mha", "decoupled"],
)
def test_kv_bytes_are_those_of_the_cache(config: Any, expected: int) -> None:
    family = HeadfuseForCausalLM if config.model_type == "headfuse" else LlamaForCausalLM
    cache = family(config).eval()(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    sizes = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    assert kv_bytes_per_token(config, 2) == 2 * expected == 2 * sum(sizes) / 7


def test_decoupled_folder(tmp_path: Path, data: str) -> None:
    HeadfuseForCausalLM(decoupled()).save_pretrained(tmp_path / "fused")
    write_tokenizer(tmp_path / "fused", WORDS)
    result = evaluate(str(tmp_path / "fused"), data=data, samples=4, sequence_length=16, device="cpu")
    assert result.model.kv_bytes_per_token == 9 * 8 * 4


def test_stored_dtype_is_that_of_most_numbers(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, model / "model.safetensors")
    assert stored_dtype(Checkpoint(model)) == torch.float16


def test_short_text_gives_fewer_windows_and_says_so(model: Path, data: str, caplog: pytest.LogCaptureFixture) -> None:
    result = evaluate(str(model), data=data, samples=1000, sequence_length=32, device="cpu")
    assert result.windows == (50 * 21 - 1) // 32
    assert f"first {result.windows} " in result.protocol
    assert "fewer than the 1000" in caplog.text


def test_shuffled_text_is_another_sample_and_says_so(model: Path, data: str) -> None:
    result = evaluate(str(model), data=data, samples=4, sequence_length=16, device="cpu", seed=0)
    assert "shuffled" in result.protocol
    assert result.model.nll != evaluate(str(model), data=data, samples=4, sequence_length=16, device="cpu").model.nll


def test_packaged_text_is_used_with_a_warning(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = evaluate(str(model), samples=2, sequence_length=16, device="cpu")
    assert (result.data, result.windows) == ("default", 2)
    assert "bundled prose and code" in caplog.text


def test_command_document_and_table(model: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", data, "--samples", "4", "--sequence-length", "16", "--device", "cpu"]
    for baseline in (None, str(model)):
        compared = [] if baseline is None else ["--baseline", baseline]
        document = json.loads(CliRunner().invoke(app, ["eval", str(model), *compared, *options, "--json"]).stdout)
        assert json.loads(json.dumps(document)) == document
        render(document, Console(width=100))
        printed = capsys.readouterr().out
        assert f"{document['model']['nll']:.4f}" in printed
        assert document["protocol"][-30:] in printed.replace("\n", " ")
        assert ("model to baseline" in printed) == (baseline is not None)


# ---------------------------------------------------------------- bad input


def check_error(kind: type[HeadfuseError], message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        evaluate(*map(str, arguments), **{"samples": 4, "sequence_length": 16, "device": "cpu", **options})
    assert message in str(caught.value)
    assert caught.value.fix


def test_bad_options(model: Path, data: str) -> None:
    short = str(Path(data).with_name("short") / "text.jsonl")
    Path(short).parent.mkdir()
    Path(short).write_text('{"text": "w1 w2 w3"}')
    check_error(ConfigError, "hold no prediction", model, data=data, samples=0)
    check_error(ConfigError, "hold no prediction", model, data=data, sequence_length=1)
    check_error(ConfigError, "65 is more than the model's context of 64", model, data=data, sequence_length=65)
    check_error(ConfigError, "sampels: unknown key, did you mean 'samples'?", model, data=data, sampels=1)
    check_error(ConfigError, "dtype is 'int8'", model, data=data, dtype="int8")
    check_error(DataError, "text.jsonl: holds 3 tokens; 16 are needed", model, data=short)
    check_error(DataError, "no such file", model, data="missing.txt")
    check_error(CheckpointError, "no such folder", "missing", data=data)


@pytest.mark.parametrize(
    ("option", "parent"),
    [
        ({"ruler_tasks": "vt"}, "--ruler"),
        ({"ruler_trials": 3}, "--ruler"),
        ({"passkey_trials": 3}, "--passkey"),
        ({"limit": 5}, "--tasks"),
        ({"tasks_path": ["folder"]}, "--tasks"),
    ],
)
def test_options_of_another_option_that_is_not_given(
    model: Path, data: str, option: dict[str, Any], parent: str
) -> None:
    (name,) = option
    message = f"--{name.replace('_', '-')}: is for {parent}, which is not given"
    check_error(ConfigError, message, model, data=data, **option)


def test_what_is_given_twice_is_measured_once(tmp_path: Path) -> None:
    given = {"passkey": "700,600,700", "ruler": "512,512", "ruler_tasks": "vt,cwe,vt", "tasks": ["a", "b", "a"]}
    config, _ = EVALUATE.read(None, given)
    assert (config.passkey, config.ruler) == ((700, 600), (512,))
    assert (config.ruler_tasks, config.tasks) == (("vt", "cwe"), ("a", "b"))


def test_baseline_needs_the_same_tokenizer(model: Path, data: str, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", words=WORDS[::-1])
    check_error(ConfigError, "tokenises the text differently", model, data=data, baseline=str(other))


def test_tokenizer_larger_than_the_embeddings(model: Path, data: str, caplog: pytest.LogCaptureFixture) -> None:
    write_tokenizer(model, [*WORDS, "one more"])
    evaluate(str(model), data=data, samples=2, sequence_length=16, device="cpu")
    assert [r.getMessage() for r in caplog.records if "does not embed 1 of the tokenizer's tokens" in r.getMessage()]


def test_predictions_that_are_not_finite(model: Path, data: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors["lm_head.weight"] *= 1e38
    tensors["model.norm.weight"] *= 1e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_error(CheckpointError, "not finite", model, data=data)


def test_float16_that_overflows_is_no_damage(model: Path, data: str) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    tensors["lm_head.weight"] *= 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options: dict[str, Any] = {"data": data, "samples": 2, "sequence_length": 16, "device": "cpu"}
    with pytest.raises(CheckpointError, match="not finite") as caught:
        evaluate(str(model), dtype="float16", **options)
    assert "--dtype bfloat16 or float32" in str(caught.value.fix)
    assert evaluate(str(model), **options).dtype is None
    assert evaluate(str(model), dtype="bfloat16", **options).dtype == "bfloat16"


def test_a_passkey_beyond_the_finite_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt may overflow where the windows of text do not."""
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    whole = passkey.model_states

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        return replace(whole(*args, **kwargs), last=torch.full_like(whole(*args, **kwargs).last, math.inf))

    monkeypatch.setattr(passkey, "model_states", overflowing)
    options: dict[str, Any] = {"samples": 2, "sequence_length": 16, "device": "cpu"}
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate(str(folder), data=str(tmp_path / "text.txt"), passkey="400", passkey_trials=1, **options)
