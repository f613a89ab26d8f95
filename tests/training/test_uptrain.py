"""`uptrain`: what a whole run learns, logs and writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from headfuse.checkpoint.checksums import file_sha256
from headfuse.checkpoint.plan_file import read_plan
from headfuse.cli.app import app
from headfuse.cli.uptrain import render
from headfuse.errors import ConfigError, HeadfuseError
from headfuse.evaluation.perplexity import nll_per_window
from headfuse.modeling import HeadfuseForCausalLM
from headfuse.models.loading import load_model, load_tokenizer
from headfuse.text.stream import TrainingText
from headfuse.training.loop import Progress
from tests.training.runs import losses, records, train, without_dropout


def test_writes_the_format_that_it_read(fused: Path, data: str, tmp_path: Path) -> None:
    before = {file.name: file_sha256(file) for file in fused.iterdir()}
    result = train(fused, data)
    output = tmp_path / "fused-uptrained"
    assert result.output == output
    assert {file.name for file in output.iterdir()} == {file.name for file in fused.iterdir()} | {
        "train_log.jsonl",
        "uptrain.yaml",
    }
    assert {file.name: file_sha256(file) for file in fused.iterdir()} == before
    assert not list(tmp_path.glob("*.partial"))

    old, new = load_file(fused / "model.safetensors"), load_file(output / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    assert all(not torch.equal(old[name], new[name]) for name in old)
    assert json.loads((output / "config.json").read_text()) == json.loads((fused / "config.json").read_text())
    assert (output / "headfuse.yaml").read_text() == (fused / "headfuse.yaml").read_text()
    plan = read_plan(output)
    assert plan.layers == read_plan(fused).layers
    assert plan.files == {f.name: file_sha256(f) for f in output.iterdir() if f.name != "plan.json"}
    card = (output / "README.md").read_text()
    assert card.startswith((fused / "README.md").read_text())
    assert "## Uptraining" in card
    assert "`source`" in card
    for file in ("README.md", "plan.json", "train_log.jsonl", "config.json"):
        assert str(tmp_path) not in (output / file).read_text()


def test_learns_and_logs(fused: Path, data: str) -> None:
    seen: list[Progress] = []
    result = train(fused, data, tokens=60 * 32, on_progress=seen.append)
    assert result.nll_before is not None
    assert result.nll_after is not None
    assert result.nll_teacher is not None
    assert result.validation_windows > 0
    lines = records(result.output)
    five = [*["step"] * 5, "validation"]
    assert [line["event"] for line in lines] == ["start", *five * 12, "end"]
    assert lines[-3]["loss"] < lines[1]["loss"]
    validations = [line["nll"] for line in lines if line["event"] == "validation"]
    assert [progress.validation for progress in seen[::-5]] == validations[::-1]
    assert min(validations) == result.nll_after < result.nll_before
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert seen[-1].tokens == result.tokens == 60 * 32
    assert seen[-1].learning_rate == pytest.approx(1e-3)
    json.dumps(result.to_dict())


def test_cross_entropy_needs_no_teacher(fused: Path, data: str, tmp_path: Path) -> None:
    (fused / "plan.json").unlink()
    result = train(fused, data, loss="ce", tokens=40 * 32)
    assert result.teacher is None
    assert result.nll_after < result.nll_before  # type: ignore[operator]
    assert not (result.output / "plan.json").exists()


def test_a_damaged_plan_is_refused_before_the_training(fused: Path, data: str) -> None:
    """It goes with the output; no step is made for an output that could not be written."""
    (fused / "plan.json").write_text("{")
    seen: list[Progress] = []
    with pytest.raises(HeadfuseError, match=r"plan\.json"):
        train(fused, data, loss="ce", on_progress=seen.append)
    assert not seen


def test_decoupled_model(source: Path, decoupled: Path, data: str) -> None:
    result = train(decoupled, data, teacher=str(source), tokens=40 * 32)
    assert {file.name for file in decoupled.iterdir()} < {file.name for file in result.output.iterdir()}
    loaded = load_model(result.output, device="cpu")
    assert isinstance(loaded, HeadfuseForCausalLM)
    assert loaded.config.num_value_heads == [1, 3]
    lines = [line for line in records(result.output) if line["event"] == "step"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_written_dtype(fused: Path, data: str) -> None:
    result = train(fused, data, dtype="bfloat16")
    assert {t.dtype for t in load_file(result.output / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((result.output / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(result.output, device="cpu").config.num_key_value_heads == 2


def test_accumulation_equals_a_larger_batch(fused: Path, data: str, tmp_path: Path) -> None:
    for folder in (fused, tmp_path / "source"):  # dropout draws other numbers
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    options: dict[str, Any] = {"teacher": str(tmp_path / "source"), "tokens": 4 * 64, "dtype": "float32"}
    one = train(fused, data, batch_size=4, output=tmp_path / "one", **options)
    two = train(fused, data, batch_size=2, gradient_accumulation=2, output=tmp_path / "two", **options)
    assert one.steps == two.steps == 4
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_key_and_value_projections_can_have_their_own_learning_rate(fused: Path, data: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 32, "dtype": "float32"}
    once = load_file(
        train(fused, data, fused_learning_rate=1.0, output=tmp_path / "a", **options).output / "model.safetensors"
    )
    twice = load_file(
        train(fused, data, fused_learning_rate=2.0, output=tmp_path / "b", **options).output / "model.safetensors"
    )
    for name, start in load_file(fused / "model.safetensors").items():
        factor = 2.0 if ".k_proj." in name or ".v_proj." in name else 1.0
        assert torch.allclose(twice[name] - start.float(), factor * (once[name] - start.float()), atol=1e-5), name


def test_same_seed_same_bytes(fused: Path, data: str, tmp_path: Path) -> None:
    sums = [
        file_sha256(train(fused, data, seed=seed, output=tmp_path / str(i)).output / "model.safetensors")
        for i, seed in enumerate((0, 0, 1))
    ]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize("options", [{"loss": "kl", "cross_entropy": 0.5, "hidden": 0.1}, {"layerwise": 0.5}])
def test_other_losses_learn(fused: Path, data: str, options: dict[str, Any]) -> None:
    result = train(fused, data, tokens=40 * 32, **options)
    steps = losses(result.output)
    assert steps[-1][1] < steps[21][1] < steps[0][1] or not options.get("layerwise")
    assert result.nll_after < result.nll_before  # type: ignore[operator]


def test_layerwise_start_trains_the_layers_alone(fused: Path, data: str, tmp_path: Path) -> None:
    trained = train(fused, data, tokens=32, layerwise=1.0, dtype="float32").output / "model.safetensors"
    for name, start in load_file(fused / "model.safetensors").items():
        assert torch.equal(load_file(trained)[name], start.float()) == (".layers." not in name), name


@pytest.mark.parametrize("layout", ["gqa", "decoupled"])
@pytest.mark.parametrize("kind", ["attention", "lora"])
def test_only_attention_is_trained(
    source: Path, fused: Path, decoupled: Path, data: str, kind: str, layout: str
) -> None:
    pytest.importorskip("peft")
    model = fused if layout == "gqa" else decoupled
    result = train(model, data, teacher=str(source), train=kind, tokens=40 * 32, dtype="float32")
    assert result.nll_after < result.nll_before  # type: ignore[operator]
    before, after = load_file(model / "model.safetensors"), load_file(result.output / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].float(), after[name]) == (".self_attn." not in name), name
        if kind == "lora" and ".self_attn." in name:
            assert torch.linalg.matrix_rank(after[name] - before[name].float(), atol=1e-5) <= 16
    again = load_model(result.output, device="cpu")
    nll = nll_per_window(again, TrainingText(data, load_tokenizer(model), 16, 0).validation).mean().item()
    assert nll == pytest.approx(result.nll_after, abs=1e-5)


def test_texts_of_one_name_stay_apart(fused: Path, data: str, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "text.jsonl").write_bytes(Path(data).read_bytes())
    result = train(fused, [data, str(tmp_path / "more" / "text.jsonl")], tokens=32)
    assert records(result.output)[0]["recipe"]["data"] == {"text.jsonl": 1.0, "text.jsonl (2)": 1.0}


def test_separate_documents_are_another_stream_of_losses(fused: Path, data: str, tmp_path: Path) -> None:
    joined = train(fused, data, output=tmp_path / "joined", tokens=64)
    separate = train(fused, data, output=tmp_path / "separate", tokens=64, packing="separate")
    assert losses(joined.output) != losses(separate.output)
    assert joined.nll_before != separate.nll_before  # validated as they are trained


@pytest.mark.parametrize("kind", [True, "selective"])
def test_gradient_checkpointing_changes_no_loss(
    fused: Path, source: Path, data: str, tmp_path: Path, kind: bool | str
) -> None:
    without_dropout(fused)
    for more in ({}, {"hidden": 0.1}, {"layerwise": 0.5}):
        if more.get("layerwise") and not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
            with pytest.raises(ConfigError, match="update transformers"):
                train(fused, data, output=tmp_path / "refused", gradient_checkpointing=kind, **more)
            continue
        options: dict[str, Any] = {"teacher": str(source), "tokens": 128, "overwrite": True, **more}
        plain = train(fused, data, **options, output=tmp_path / "plain")
        again = train(fused, data, **options, output=tmp_path / "again", gradient_checkpointing=kind)
        for a, b in zip(losses(plain.output), losses(again.output), strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_command_document_and_table(fused: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", data, "--tokens", "64", "--sequence-length", "16", "--device", "cpu", "--threads", "1"]
    document = json.loads(CliRunner().invoke(app, ["uptrain", str(fused), *options, "--json"]).stdout)
    assert document["kv_ratio"] == 0.5
    assert json.loads(json.dumps(document)) == document
    render(document, Console(width=100))
    printed = capsys.readouterr().out
    for figure in ("nll_teacher", "nll_before", "nll_after"):
        assert f"{document[figure]:.4f}" in printed
    assert f"wrote {document['output']}" in printed.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("regional", ["false", "true"])
def test_a_compiled_model_is_written_by_its_own_names(
    source: Path, fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regional: str
) -> None:
    """As a whole, or layer by layer, as `accelerate launch --dynamo_use_regional_compilation` says."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", regional)
    result = train(fused, data, teacher=str(source), tokens=64, output=tmp_path / "out")
    assert load_file(result.output / "model.safetensors").keys() == load_file(fused / "model.safetensors").keys()
