import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from conftest import tiny_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import headfuse
from headfuse.checkpoint.plan_file import read_plan, write_plan
from headfuse.checkpoint.reader import file_sha256, fingerprint
from headfuse.commands import uptrain as command
from headfuse.config.uptrain import UptrainConfig, load_recipe
from headfuse.config.values import parse_tokens
from headfuse.errors import ConfigError, DataError, HeadfuseError, MissingExtraError, OutputError, UnsupportedModelError
from headfuse.evaluation.perplexity import nll_per_window
from headfuse.modeling import HeadfuseConfig, HeadfuseForCausalLM
from headfuse.models.loading import load_model, load_tokenizer
from headfuse.models.logits import kl_divergence
from headfuse.models.states import document_positions, model_states
from headfuse.plan import FusionPlan, HeadLayout, LayerPlan, SourceModel
from headfuse.text.documents import read_documents
from headfuse.text.stream import TrainingText
from headfuse.text.windows import token_windows
from headfuse.training.accelerator import make_accelerator
from headfuse.training.loop import Progress
from headfuse.training.objective import LossWeights, Objective
from headfuse.training.schedule import (
    default_batch_size,
    default_checkpoint_every,
    default_learning_rate,
    learning_rate_at,
    num_steps,
)
from headfuse.training.uptrain import UptrainResult, default_output, uptrain

PACKAGE = Path(headfuse.__file__).parent
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


# ---------------------------------------------------------------- the mathematics


def test_kl_of_identical_models_and_its_gradient_are_zero(source: Path) -> None:
    student, teacher = load_model(source, device="cpu"), load_model(source, device="cpu")
    batch = torch.randint(0, 42, (2, 16))
    loss = Objective(student, teacher.get_output_embeddings())(batch, model_states(teacher, batch))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None) < 1e-6


def test_kl_is_the_forward_divergence() -> None:
    logits, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = teacher.softmax(-1), logits.softmax(-1)
    assert torch.allclose(kl_divergence(logits, teacher), (p * (p / q).log()).sum())
    assert not torch.allclose(kl_divergence(logits, teacher), (q * (q / p).log()).sum())


def reference_loss(
    student: Any, teacher: Any, batch: torch.Tensor, weights: LossWeights, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of whole logits, as its words say it."""
    with torch.no_grad():
        taught = teacher(batch, position_ids=positions, output_hidden_states=True, use_cache=False)
    mine = student(batch, position_ids=positions, output_hidden_states=True, use_cache=False)
    logits, p = mine.logits, taught.logits.softmax(-1)
    loss = weights.kl * (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None]).mean()
    loss = loss + weights.cross_entropy * nll
    if weights.hidden:  # transformers norms the last entry; there is one layer before it
        a, b = mine.hidden_states[1], taught.hidden_states[1]
        loss = loss + weights.hidden * ((a - b).square().sum(-1) / b.square().sum(-1)).mean()
    return loss


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(0, 1), LossWeights(0.7, 0.3), LossWeights(1, 0.5)])
@pytest.mark.parametrize("chunk", [1000, 5])
@pytest.mark.parametrize("separate", [False, True])
def test_chunks_have_loss_and_gradient_of_the_whole_logits(
    source: Path, fused: Path, weights: LossWeights, chunk: int, separate: bool
) -> None:
    student, teacher = load_model(fused, device="cpu"), load_model(source, device="cpu")
    batch = torch.randint(0, 12, (2, 16))
    positions = document_positions(batch, 1) if separate else None
    objective = Objective(student, teacher.get_output_embeddings(), weights, chunk)
    with torch.no_grad():
        states = model_states(teacher, batch, positions)
    results = []
    for loss in (reference_loss(student, teacher, batch, weights, positions), objective(batch, states, positions)):
        student.zero_grad()
        (3 * loss).backward()
        results.append([loss.detach(), *(p.grad.clone() for p in student.parameters())])
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, rtol=1e-4, atol=1e-6)


def test_hidden_state_term(source: Path, fused: Path) -> None:
    student, teacher, batch = (
        load_model(fused, device="cpu"), load_model(source, device="cpu"), torch.randint(0, 42, (2, 16)),
    )  # fmt: skip
    states = model_states(teacher, batch, layers=True)
    with torch.no_grad():
        first, last = teacher(batch, output_hidden_states=True).hidden_states[1:]
    assert torch.equal(states.outputs[0], first)
    assert torch.equal(states.inputs[1], first)
    assert torch.equal(teacher.model.norm(states.outputs[1]), last)
    head = teacher.get_output_embeddings()
    plain = Objective(student, head, LossWeights())(batch, states)
    both = model_states(student, batch, layers=True).outputs, states.outputs
    errors = [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(*both, strict=True)]
    whole = Objective(student, head, LossWeights(hidden=2.0))(batch, states)
    assert torch.allclose(whole, plain + sum(errors), rtol=1e-5)


def test_layerwise_loss_gives_every_layer_the_teachers_input(source: Path, fused: Path) -> None:
    student, teacher, batch = (
        load_model(fused, device="cpu"), load_model(source, device="cpu"), torch.randint(0, 42, (2, 16)),
    )  # fmt: skip
    with torch.no_grad():
        states = model_states(teacher, batch, layers=True)
    loss = Objective(student, teacher.get_output_embeddings())(batch, states, None, "layerwise")
    rotary = student.model.rotary_emb(states.inputs[0], torch.arange(16)[None])
    errors = []
    for layer, before, after in zip(student.model.layers, states.inputs, states.outputs, strict=True):
        out = layer(before, position_embeddings=rotary)
        errors.append(((out - after).square().sum(-1) / (after - before).square().sum(-1)).mean())
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.model.layers.parameters())
    assert student.model.norm.weight.grad is None
    same = Objective(teacher, teacher.get_output_embeddings())(batch, states, None, "layerwise")
    assert same.item() < 1e-10


@pytest.mark.parametrize("layout", ["gqa", "decoupled"])
def test_separate_documents_do_not_see_each_other(source: Path, decoupled: Path, layout: str) -> None:
    model = load_model(source if layout == "gqa" else decoupled, device="cpu")
    batch = torch.randint(2, 42, (3, 20))
    batch[0, 7] = batch[0, 12] = batch[1, 19] = batch[2, 0] = 1
    positions = document_positions(batch, 1)
    assert positions[0].tolist() == [*range(8), *range(5), *range(7)]
    assert positions[1].tolist() == list(range(20))
    assert positions[2].tolist() == [0, *range(19)]
    with torch.no_grad():
        packed = model_states(model, batch, positions).last
        for row, start, end in ((0, 0, 8), (0, 8, 13), (0, 13, 20), (1, 0, 20), (2, 0, 1), (2, 1, 20)):
            alone = model_states(model, batch[row : row + 1, start:end]).last[0]
            assert torch.allclose(packed[row, start:end], alone, atol=1e-5)


def test_schedule_warms_up_and_falls_along_a_cosine_to_a_tenth() -> None:
    recipe = UptrainConfig.model_validate({"data": "a", "tokens": 1})
    rates = [learning_rate_at(step, 100, recipe) for step in range(100)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3 + 48] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate_at(0, 1, recipe) == 1.0


def test_steps_come_nearest_to_the_tokens() -> None:
    assert [num_steps(tokens, 4096) for tokens in (1, 82_000, 246_000, 6143, 6145)] == [1, 20, 60, 1, 2]


def test_validations_are_ten_or_a_tenth_of_the_time() -> None:
    assert default_checkpoint_every(500, 8, 16) == 50
    assert default_checkpoint_every(500, 1, 16) == 50
    assert default_checkpoint_every(59, 1, 16) == 40
    assert default_checkpoint_every(12, 1, 16) == 12
    assert default_checkpoint_every(12, 8, 0) == 10


def test_default_learning_rate_goes_by_size() -> None:
    assert [default_learning_rate(size) for size in (6e6, 135e6, 7e9)] == [2e-4, 1e-4, 2e-5]


def test_default_batch_is_small_where_tokens_are_few() -> None:
    assert [default_batch_size(tokens, 512) for tokens in (1, 82_000, 1_100_000, 50_000_000)] == [1, 1, 4, 8]


# ---------------------------------------------------------------- a whole run


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


# ---------------------------------------------------------------- recipes, texts, teachers


def test_packaged_recipes_are_strict_and_run(fused: Path, data: str, tmp_path: Path) -> None:
    names = sorted(p.name.removesuffix(".yaml") for p in (PACKAGE / "data" / "recipes").iterdir())
    assert {"recover", "dha", "two-stage", "attention", "lora"} <= set(names)
    defaults = load_recipe(None, {"data": data, "tokens": 1})
    assert load_recipe("recover", {"data": data, "tokens": 1}) == defaults
    for name in names:
        assert load_recipe(name, {"data": data, "tokens": "50M"}).tokens == 50_000_000
    with pytest.raises(ConfigError, match="give a YAML file or a packaged name: attention, dha"):
        load_recipe("recovery", {})


def test_the_yaml_of_the_docs_is_every_option_with_its_default(tmp_path: Path) -> None:
    text = (PACKAGE.parent / "docs" / "uptraining.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
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
    with pytest.raises(ConfigError, match="tokens: Field required"):
        train(fused, data, tokens=None)


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


def test_missing_peft_is_one_clear_error(fused: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="peft is not installed") as caught:
        train(fused, data, train="lora")
    assert "pip install 'headfuse[lora]'" in str(caught.value)


def test_cached_teacher_is_the_live_one(
    fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.txt").write_text(" ".join(WORDS * 20))
    options: dict[str, Any] = {"validation_data": str(tmp_path / "other.txt")}
    live, cache = train(fused, data, output=tmp_path / "live", **options), tmp_path / "cache"
    first = train(fused, data, output=tmp_path / "first", teacher_cache=cache, **options)
    loaded = []

    def load(folder: Path, **how: Any) -> Any:
        loaded.append(folder)
        return load_model(folder, **how)

    monkeypatch.setattr(sys.modules["headfuse.training.uptrain"], "load_model", load)
    second = train(fused, data, output=tmp_path / "second", teacher_cache=cache, **options)
    assert loaded == [fused]
    assert first.nll_teacher == second.nll_teacher == pytest.approx(live.nll_teacher, abs=1e-6)
    assert losses(first.output) == losses(second.output)
    for a, b in zip(losses(live.output), losses(first.output), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    train(fused, data, output=tmp_path / "third", teacher_cache=cache, **options, seed=1)  # another order
    assert loaded == [fused, fused, tmp_path / "source"]
    with pytest.raises(ConfigError, match="last states alone"):
        train(fused, data, output=tmp_path / "fourth", teacher_cache=cache, hidden=0.1)
    with pytest.raises(OutputError, match="is not a cache"):
        train(fused, data, output=tmp_path / "fourth", teacher_cache=fused)


def test_half_a_cache_is_filled_anew(fused: Path, data: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = train(fused, data, output=tmp_path / "whole", teacher_cache=cache)
    (cache / "cache.json").unlink()
    (cache / "hidden.bin").write_bytes(b"\0" * 100)
    again = train(fused, data, output=tmp_path / "again", teacher_cache=cache)
    assert losses(whole.output) == losses(again.output)


def test_teacher_in_another_dtype(fused: Path, data: str, tmp_path: Path) -> None:
    full = train(fused, data, output=tmp_path / "full")
    half = train(fused, data, output=tmp_path / "half", teacher_dtype="bfloat16", teacher_device="cpu")
    assert losses(half.output) != losses(full.output)
    assert half.nll_teacher == pytest.approx(full.nll_teacher, abs=0.02)


def test_separate_documents_are_another_stream_of_losses(fused: Path, data: str, tmp_path: Path) -> None:
    joined = train(fused, data, output=tmp_path / "joined", tokens=64)
    separate = train(fused, data, output=tmp_path / "separate", tokens=64, packing="separate")
    assert losses(joined.output) != losses(separate.output)
    assert joined.nll_before == separate.nll_before


def test_gradient_checkpointing_changes_no_loss(fused: Path, source: Path, data: str, tmp_path: Path) -> None:
    without_dropout(fused)
    for more in ({}, {"hidden": 0.1}, {"layerwise": 0.5}):
        options: dict[str, Any] = {"teacher": str(source), "tokens": 128, "overwrite": True, **more}
        plain = train(fused, data, **options, output=tmp_path / "plain")
        again = train(fused, data, **options, output=tmp_path / "again", gradient_checkpointing=True)
        for a, b in zip(losses(plain.output), losses(again.output), strict=True):
            assert a == pytest.approx(b, rel=1e-5)


# ---------------------------------------------------------------- validation


def test_early_stop_and_the_best_weights(fused: Path, data: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 60 * 32, "learning_rate": 0.2, "patience": 2, "dtype": "float32"}
    result = train(fused, data, **options)
    found = {line["step"]: line["nll"] for line in records(result.output) if line["event"] == "validation"}
    best = min(found, key=lambda step: found[step])
    assert best < result.steps < 60
    assert [step > best for step in found].count(True) == 2
    assert (result.best_step, result.steps) == (best, max(found))
    assert result.nll_after == pytest.approx(found[best], abs=1e-6)
    shorter = train(fused, data, **{**options, "patience": None}, output=tmp_path / "all")
    assert shorter.steps == 60
    assert shorter.nll_after == pytest.approx(min(found.values()), abs=1e-6) or shorter.best_step > result.steps

    with pytest.raises(Stop):
        train(fused, data, **options, output=tmp_path / "cut", on_progress=stop_at(result.steps))
    kept = {folder.name for folder in (tmp_path / "cut.partial" / "state").iterdir()}
    assert kept == {f"step-{step:07d}" for step in (best, result.steps)}
    again = train(fused, data, **options, output=tmp_path / "cut", resume=True)
    assert again.steps == result.steps
    assert file_sha256(again.output / "model.safetensors") == file_sha256(result.output / "model.safetensors")


def test_validation_text_of_its_own(fused: Path, data: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(" ".join(WORDS * 20))
    result = train(fused, data, validation_data=str(tmp_path / "other.txt"), validation_windows=7)
    windows = token_windows(read_documents(str(tmp_path / "other.txt")), load_tokenizer(fused), 16, 7)
    expected = nll_per_window(load_model(tmp_path / "source", device="cpu"), windows).mean().item()
    assert result.nll_teacher == pytest.approx(expected, abs=1e-6)
    assert "7 windows of 16 tokens of `other.txt`" in (result.output / "README.md").read_text()


# ---------------------------------------------------------------- processes


def without_dropout(*folders: Path) -> None:
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))


def launch(script: list[str], processes: int, code: int = 0) -> None:
    """Run Python in processes that find each other, as `accelerate launch` and torchrun start them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, *script], env={**common, "RANK": str(i), "LOCAL_RANK": str(i)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code] * processes, "\n".join(outputs)
    assert not any("wrote" in output for output in outputs[1:])


def test_two_processes_equal_one_at_the_same_global_batch(source: Path, fused: Path, data: str, tmp_path: Path) -> None:
    without_dropout(source, fused)
    options: dict[str, Any] = {"teacher": str(source), "dtype": "float32"}
    one = train(fused, data, output=tmp_path / "one", batch_size=4, **options)
    line = [
        "-m", "headfuse", "uptrain", str(fused), "--teacher", str(source), "--data", data, "--tokens", "384",
        "--batch-size", "1", "--gradient-accumulation", "2", "--sequence-length", "16", "--checkpoint-every", "5",
        "--learning-rate", "1e-2", "--dtype", "float32", "--device", "cpu", "--threads", "1",
        "-o", str(tmp_path / "two"),
    ]  # fmt: skip
    launch(line, 2)
    two = records(tmp_path / "two")
    assert two[0]["processes"] == 2
    for a, b in zip(losses(one.output), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert two[0]["nll_before"] == pytest.approx(one.nll_before, abs=1e-5)
    assert two[-1]["nll_after"] == pytest.approx(one.nll_after, abs=1e-4)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


SHARDED = """
import copy, sys
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from types import SimpleNamespace
from torch.distributed.fsdp import FSDPModule
from headfuse.models.states import decoder_layers, model_states
from headfuse.training.objective import LossWeights, Objective
from headfuse.models.loading import load_model
dist.init_process_group("gloo")
plugin = dict(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**plugin)), torch_device_mesh=None,
    mixed_precision="no", is_main_process=True, device=torch.device("cpu"),
)
student, teacher = (load_model(folder, device="cpu") for folder in sys.argv[1:])
torch.manual_seed(0)
batch = torch.randint(0, 42, (2, 16))
own = batch[dist.get_rank()][None]
for mode, weights in (("loss", LossWeights(1, 0.5, 0.3)), ("layerwise", LossWeights())):
    whole, part = copy.deepcopy(student), copy.deepcopy(student)
    head = teacher.get_output_embeddings()
    Objective(whole, head, weights)(batch, model_states(teacher, batch, layers=True), None, mode).backward()
    objective = fsdp2_prepare_model(accelerator, Objective(part, head, weights))
    assert all(isinstance(layer, FSDPModule) for layer in decoder_layers(part))
    assert part.get_output_embeddings().weight is part.get_input_embeddings().weight
    objective(own, model_states(teacher, own, layers=True), None, mode).backward()
    for a, b in zip(part.parameters(), whole.parameters(), strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad.full_tensor(), b.grad, atol=1e-6)
"""


@pytest.mark.slow
def test_sharded_gradients_are_those_of_one_process(source: Path, fused: Path) -> None:
    """FSDP2 on two processes; accelerate itself shards on accelerators alone."""
    without_dropout(source, fused)
    launch(["-c", SHARDED, str(fused), str(source)], 2)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("phi3", {}, "fused_learning_rate: rows of a sharded qkv_proj have one rate"),
        ("llama", {"train": "lora"}, "train: lora: adapters cannot be merged into sharded weights"),
    ],
)
def test_what_sharded_weights_do_not_allow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, options: dict[str, Any], message: str
) -> None:
    def sharding(*args: Any, **kwargs: Any) -> Any:
        accelerator = make_accelerator(*args, **kwargs)
        monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType.FSDP)
        return accelerator

    monkeypatch.setattr(sys.modules["headfuse.training.uptrain"], "make_accelerator", sharding)
    model = tiny_model(tmp_path / "model", model_type)
    with pytest.raises(ConfigError) as caught:
        train(model, str(tmp_path / "text.txt"), loss="ce", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "model-uptrained.partial").exists()


TOGETHER = """
import os, signal, sys
from pathlib import Path
from headfuse.training.uptrain import uptrain
model, teacher, data, output, last = sys.argv[1:]
def kill(progress):
    if progress.step == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
uptrain(model, teacher=teacher, data=data, tokens=384, batch_size=1, sequence_length=16, checkpoint_every=5,
        learning_rate=1e-2, device="cpu", threads=1, output=Path(output), resume=True, on_progress=kill)
"""


@pytest.mark.slow
def test_killed_processes_go_on_together(source: Path, fused: Path, data: str, tmp_path: Path) -> None:
    """With dropout, of which each process draws its own."""
    script = ["-c", TOGETHER, str(fused), str(source), data]
    launch([*script, str(tmp_path / "whole"), "-1"], 2)
    launch([*script, str(tmp_path / "out"), "7"], 2, code=-signal.SIGKILL)
    assert json.loads((tmp_path / "out.partial" / "resume.json").read_text())["step"] == 5
    launch([*script, str(tmp_path / "out"), "-1"], 2)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    sums = [file_sha256(tmp_path / name / "model.safetensors") for name in ("out", "whole")]
    assert sums[0] == sums[1]


# ---------------------------------------------------------------- trackers and the live line


def test_tensorboard(fused: Path, data: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(fused, data, trackers=["tensorboard"], tracker_folder=tmp_path / "runs")
    board = EventAccumulator(str(tmp_path / "runs" / "fused-uptrained" / "headfuse"))
    board.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("loss")] == losses(result.output)
    assert [e.step for e in board.Scalars("validation_nll")] == [5, 10, 12]
    assert not list(result.output.rglob("events*"))  # their names hold that of the machine


def test_wandb_offline(fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    train(fused, data, trackers=["wandb"])
    assert list((tmp_path / "runs" / "fused-uptrained").rglob("run-*.wandb"))
    assert not (tmp_path / "wandb").exists()


def test_unknown_and_missing_trackers(fused: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="choose from tensorboard, wandb"):
        train(fused, data, trackers=["tensorbord"])
    monkeypatch.setattr("headfuse.training.accelerator.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="is not installed") as caught:
        train(fused, data, trackers=["wandb"])
    assert "pip install wandb" in str(caught.value)


def test_live_line_is_on_terminals_alone(
    fused: Path, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "model": str(fused), "data": data, "tokens": 64, "sequence_length": 16, "device": "cpu", "overwrite": True,
    }  # fmt: skip
    command.run(**options)
    assert "validation NLL" not in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    command.run(**options)
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", capsys.readouterr().err)
    assert re.search(r"loss \d\.\d+, validation NLL \d\.\d+ [\d,]+ tokens/s, left", shown)
    command.run(**options, quiet=True)
    assert "validation NLL" not in capsys.readouterr().err


# ---------------------------------------------------------------- kill -9, a full disk


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from headfuse.checkpoint.reader import file_sha256
from headfuse.training.uptrain import uptrain
model, data, folder, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])

def start(output):
    child = os.fork()
    if not child:
        uptrain(model, data=data, tokens=1280, batch_size=2, sequence_length=16, checkpoint_every=2, learning_rate=1e-2,
                device="cpu", threads=1, output=output, resume=True)
        os._exit(0)
    return child

began = time.monotonic()
assert os.waitpid(start(folder / "whole"), 0)[1] == 0
seconds = time.monotonic() - began
wanted, out = file_sha256(folder / "whole" / "model.safetensors"), folder / "out"
chance = random.Random(kills)
while kills:
    child = start(out)
    time.sleep(chance.uniform(0.2, 1.0) * seconds)
    done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills -= 1
    if out.exists():  # it was faster, or was killed after it was done
        assert file_sha256(out / "model.safetensors") == wanted
        out.rename(folder / f"done-{kills}-{time.monotonic()}")
assert os.waitpid(start(out), 0)[1] == 0
assert file_sha256(out / "model.safetensors") == wanted
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(fused: Path, data: str, tmp_path: Path, kills: int) -> None:
    """`kill -9` while models load, steps run, states are written: the weights in the end are the same."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", KILLED, str(fused), data, str(tmp_path), str(kills)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_full_disk_keeps_the_last_state(fused: Path, data: str, tmp_path: Path) -> None:
    """Writes beyond a limit fail as those on a full disk do."""
    whole, output = train(fused, data, output=tmp_path / "whole"), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Progress) -> None:
        if progress.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(OutputError) as caught:
            train(fused, data, output=output, on_progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert [folder.name for folder in (tmp_path / "out.partial" / "state").iterdir()] == ["step-0000005"]
    train(fused, data, output=output, resume=True)
    assert file_sha256(output / "model.safetensors") == file_sha256(whole.output / "model.safetensors")


def test_states_are_also_written_as_time_passes(
    fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(fused, data, output=tmp_path / "whole")
    monkeypatch.setattr("headfuse.training.loop.STATE_SECONDS", 0.0)
    with pytest.raises(Stop):
        train(fused, data, output=tmp_path / "out", on_progress=stop_at(8))
    assert json.loads((tmp_path / "out.partial" / "resume.json").read_text())["step"] == 8
    train(fused, data, output=tmp_path / "out", resume=True)
    assert losses(tmp_path / "out") == losses(whole.output)
    sums = [file_sha256(tmp_path / name / "model.safetensors") for name in ("out", "whole")]
    assert sums[0] == sums[1]


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("step", [5, 8, 12])
def test_resumed_run_equals_an_uninterrupted_one(fused: Path, data: str, tmp_path: Path, step: int) -> None:
    whole, output = train(fused, data, output=tmp_path / "whole"), tmp_path / "out"
    with pytest.raises(Stop):
        train(fused, data, output=output, on_progress=stop_at(step))
    assert not output.exists()
    with pytest.raises(OutputError, match="interrupted run"):
        train(fused, data, output=output)
    torch.rand(7)  # the resumed run must not depend on where the generator happens to be
    resumed = train(fused, data, output=output, resume=True)
    assert file_sha256(output / "model.safetensors") == file_sha256(whole.output / "model.safetensors")
    assert losses(output) == losses(whole.output)
    assert (resumed.nll_before, resumed.nll_after) == (whole.nll_before, whole.nll_after)
    assert resumed.epochs == whole.epochs > 0
    assert {file.name for file in output.iterdir()} == {file.name for file in whole.output.iterdir()}


def test_interrupted_save_leaves_the_state_before(
    fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    whole, output = train(fused, data, output=tmp_path / "whole"), tmp_path / "out"
    save_state, calls = Accelerator.save_state, []

    def full_disk(self: Accelerator, folder: str, **options: Any) -> None:
        calls.append(folder)
        save_state(self, folder, **options)
        if len(calls) == 2:
            Path(folder, "pytorch_model.bin").write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(Accelerator, "save_state", full_disk)
    with pytest.raises(OutputError, match="checkpoint after step 10 cannot be written"):
        train(fused, data, output=output)
    state = tmp_path / "out.partial" / "state"
    assert [folder.name for folder in state.iterdir()] == ["step-0000005"]
    train(fused, data, output=output, resume=True)
    assert file_sha256(output / "model.safetensors") == file_sha256(whole.output / "model.safetensors")


@pytest.mark.parametrize("damage", ["resume.json", "no state", "half a state"])
def test_damaged_state_is_one_clear_error(fused: Path, data: str, tmp_path: Path, damage: str) -> None:
    with pytest.raises(Stop):
        train(fused, data, on_progress=stop_at(7))
    partial = tmp_path / "fused-uptrained.partial"
    (state,) = (partial / "state").iterdir()
    if damage == "resume.json":
        (partial / "resume.json").write_text('{"command": "uptrain", "recipe": {}, "inputs": {}}')
    elif damage == "no state":
        state.rename(tmp_path / "elsewhere")
    else:
        weights = state / "pytorch_model.bin"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OutputError, match=r"damaged|is missing|cannot be read") as caught:
        train(fused, data, resume=True)
    assert "--overwrite" in str(caught.value)


def test_only_the_last_state_is_kept(fused: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(fused, data, output=tmp_path / "out", on_progress=stop_at(11))
    assert [folder.name for folder in (tmp_path / "out.partial" / "state").iterdir()] == ["step-0000010"]


def test_failure_before_the_first_state_leaves_nothing(fused: Path, data: str, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(Stop):
        train(fused, data, on_progress=stop_at(3))
    assert set(tmp_path.iterdir()) == before


def test_resuming_with_other_options_is_refused(fused: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(fused, data, on_progress=stop_at(7))
    with pytest.raises(ConfigError, match=r"batch_size \(was 2, is 4\), seed \(was 0, is 3\)"):
        train(fused, data, resume=True, batch_size=4, seed=3)
    assert (tmp_path / "fused-uptrained.partial" / "resume.json").exists()
    train(fused, data, resume=True, learning_rate=None)
    assert records(tmp_path / "fused-uptrained")[-3]["learning_rate"] == pytest.approx(1e-3)


def test_diverging_run_stops_and_keeps_the_last_state(fused: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(HeadfuseError, match="at step 2; nothing was kept"):
        train(fused, data, learning_rate=1e30)
    assert not (tmp_path / "fused-uptrained.partial").exists()

    whole, output = train(fused, data, output=tmp_path / "whole"), tmp_path / "out"
    with pytest.raises(Stop):
        train(fused, data, output=output, on_progress=stop_at(8))
    with pytest.raises(HeadfuseError, match="the norm of its gradient nan") as caught:
        train(fused, data, output=output, resume=True, learning_rate=1e30)
    assert "at step 7; the state after step 5 is kept" in str(caught.value)
    assert "--resume" in str(caught.value)
    train(fused, data, output=output, resume=True)
    assert file_sha256(output / "model.safetensors") == file_sha256(whole.output / "model.safetensors")


# ---------------------------------------------------------------- bad input


def test_teacher_is_found_beside_the_model_or_in_the_working_directory(
    fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(fused, data).teacher == "source"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "source").rename(tmp_path / "elsewhere" / "source")
    with pytest.raises(ConfigError, match="source, the teacher, was not found"):
        train(fused, data, overwrite=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(fused, data, overwrite=True).teacher == "source"


def test_teacher_must_be_the_model_that_was_fused(fused: Path, data: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    write_source(tmp_path / "source", rms_norm_eps=1e-5)
    with pytest.raises(ConfigError, match="is another model") as caught:
        train(fused, data)
    assert "--teacher" in str(caught.value)
    assert train(fused, data, teacher=str(tmp_path / "source")).teacher == "source"


def test_teacher_needs_the_same_tokenizer(fused: Path, data: str, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", words=[f"v{i}" for i in range(40)])
    with pytest.raises(ConfigError, match="other: the teacher has another tokenizer"):
        train(fused, data, teacher=str(other))


def test_capped_logits_are_refused(data: str, tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=42, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        head_dim=8, num_key_value_heads=4, final_logit_softcapping=0.01,
        bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    write_tokenizer(tmp_path / "gemma2", WORDS)
    with pytest.raises(UnsupportedModelError, match="caps its logits"):
        train(tmp_path / "gemma2", data, loss="ce")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tokens": 0}, ConfigError, "tokens: Input should be greater"),
        ({"checkpoint_every": 0}, ConfigError, "checkpoint_every: Input should be greater"),
        ({"batch_size": 0}, ConfigError, "batch_size: Input should be greater"),
        ({"batch_size": 49}, ConfigError, "batch_size: one step reads 784 tokens (batch_size 49, gradient_acc"),
        ({"gradient_accumulation": 2**62}, ConfigError, "gradient_accumulation 4,611,686,018,427,387,904"),
        ({"sequence_length": 1}, ConfigError, "sequence_length: Input should be greater"),
        ({"sequence_length": 65}, ConfigError, "65 is more than the model's context of 64"),
        ({"learning_rate": math.nan}, ConfigError, "learning_rate: Input should be"),
        ({"learning_rate": 0.0}, ConfigError, "learning_rate: Input should be greater"),
        ({"weight_decay": -1.0}, ConfigError, "weight_decay: Input should be greater"),
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


def test_model_without_a_plan_needs_a_teacher(fused: Path, data: str) -> None:
    (fused / "plan.json").unlink()
    with pytest.raises(ConfigError, match="names its source") as caught:
        train(fused, data)
    assert "--teacher" in str(caught.value)


def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert default_output(Path(".")) == tmp_path / "model-uptrained"
    assert default_output(tmp_path / "model") == tmp_path / "model-uptrained"
    snapshot = tmp_path / "models--org--name/snapshots/0123"
    snapshot.mkdir(parents=True)
    assert default_output(snapshot) == tmp_path / "model/name-uptrained"


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("246000", 246_000), ("500k", 500_000), ("50M", 50_000_000), ("1.5B", 1_500_000_000), ("1_000", 1000)],
)
def test_tokens_on_the_command_line(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "-5", "0", "1e6", "5 apples", "nan", "0.0001K"])
def test_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens"):
        parse_tokens(text)


def test_command_document_and_table(fused: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = command.run(model=str(fused), data=data, tokens=64, sequence_length=16, device="cpu", threads=1)
    assert capsys.readouterr().out == ""
    assert document["kv_ratio"] == 0.5
    assert json.loads(json.dumps(document)) == document
    command.render(document, Console(width=100))
    printed = capsys.readouterr().out
    for figure in ("nll_teacher", "nll_before", "nll_after"):
        assert f"{document[figure]:.4f}" in printed
    assert f"wrote {document['output']}" in printed.replace("\n", " ")
