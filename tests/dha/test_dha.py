"""Method dha: the source at its first step, exact where the fusion loss is zero, resumable, within its budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import headfuse
from headfuse.checkpoint.plan_file import read_plan
from headfuse.config.fuse import FuseConfig, load_config
from headfuse.dha import pipeline as stages
from headfuse.dha import ratios as dha
from headfuse.errors import ConfigError, UnsupportedModelError
from headfuse.models.loading import load_model
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from tests.support.commands import fuse, run
from tests.support.model_outputs import logits
from tests.support.planted_heads import by_head, edit_heads
from tests.support.tiny_models import VOCABULARY, WORDS, tiny_model

SHORT = {"search_steps": 2, "fusion_steps": 6, "batch_size": 2, "micro_batch_size": 1, "checkpoint_every": 2}
MODELS = pytest.mark.parametrize(("model_type", "query_heads"), [("llama", 4), ("qwen2", 8)], ids=["mha", "gqa-biases"])


def options(folder: Path, budget: Any = "1/2", **more: Any) -> Path:
    """A config file for a short training."""
    config = {"method": "dha", "budget": {"total": budget}, "dha": {**SHORT, **more}}
    path = folder / "options.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def opened(folder: Path) -> tuple[Any, StreamedModel]:
    source = Source.open(str(folder))
    return load_model(folder, dtype="float32"), StreamedModel(source.checkpoint, source.config, torch.device("cpu"))


def outputs(model: Any) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


PAIRS = ((0, 2), (1, 3))
UNEVEN = ((0, 1, 3), (2,))


# ---------------------------------------------------------------- the operator


@MODELS
def test_before_the_first_step_the_model_is_the_source(tmp_path: Path, model_type: str, query_heads: int) -> None:
    model, streamed = opened(tiny_model(tmp_path / "model", model_type, query_heads=query_heads))
    wanted = outputs(model)
    sides = stages.install(model, streamed, [PAIRS, UNEVEN, ((0, 1, 2, 3),), PAIRS])
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-6, atol=1e-6)
    for side in sides:  # and a ratio is read: the model changes with any of a group
        with torch.no_grad():
            side.omega[0, side.groups[0][-1]] += 0.1
    assert (outputs(model) - wanted).abs().max() > 1e-3


@MODELS
def test_where_the_fusion_loss_is_zero_the_collapsed_model_is_the_trained_one(
    tmp_path: Path, model_type: str, query_heads: int
) -> None:
    model, streamed = opened(tiny_model(tmp_path / "model", model_type, query_heads=query_heads))
    sides = stages.install(model, streamed, [PAIRS, UNEVEN, ((0, 1, 2, 3),), PAIRS])
    generator = torch.Generator().manual_seed(0)
    for side in sides:
        with torch.no_grad():
            for group in side.groups:
                readers = [query for query, head in enumerate(side.readers) if head in group]
                side.omega[readers] = torch.randn(side.omega[0].shape, generator=generator)
        total, pairs = dha.fusion_loss(side.ratios(), side.groups, side.readers)
        assert (total.item(), pairs > 0) == (0.0, True)
    wanted = outputs(model)
    for side in sides:
        side.collapse()
        side.group(tuple((head,) for head in range(len(side.weight))))
    assert [len(side.weight) for side in sides] == [2, 2, 1, 2]
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["align", "subspace"])
@MODELS
def test_another_basis_changes_no_output(tmp_path: Path, start: str, model_type: str, query_heads: int) -> None:
    folder = tiny_model(tmp_path / "model", model_type, query_heads=query_heads)
    document = fuse(folder, tmp_path / "plan", "--budget", "1/2", "--method", "mean", "--allocator", "uniform")
    model, streamed = opened(folder)
    wanted, before = outputs(model), model.model.layers[0].self_attn.k_proj.weight.clone()
    config = FuseConfig.model_validate(
        {"calibration": {"data": str(tmp_path / "text.txt"), "samples": 4, "sequence_length": 32}}
    )
    text = Source.open(str(folder)).calibration_text(config.calibration, config.seed)
    stages.rebase(model, streamed, read_plan(Path(document["output"])), text, start)
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.model.layers[0].self_attn.k_proj.weight, before, atol=1e-2)


# ---------------------------------------------------------------- the command


def test_fuse_trains_within_the_budget_and_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    document = fuse(model, tmp_path / "out", "--config", options(tmp_path))
    assert "the whole model in memory: about 0.0 GB" in caplog.text
    assert document["kv_ratio"] == 0.5
    assert document["stages"][0]["name"] == "trained"
    plan = read_plan(tmp_path / "out")
    assert (plan.method, plan.allocator) == ("dha", "dha-greedy")
    assert logits(tmp_path / "out").isfinite().all()
    records = [json.loads(line) for line in (tmp_path / "out/train_log.jsonl").read_text().splitlines()]
    phases = [record["phase"] for record in records]
    assert phases.count("search") == 2
    assert sum(phase.startswith("fusion") for phase in phases) in (4, 6)
    assert records[-1]["tokens"] == 2 * 32 * (len(records) - 1)
    text = (tmp_path / "out/train_log.jsonl").read_text() + (tmp_path / "out/headfuse.yaml").read_text()
    assert str(tmp_path) not in text
    source, trained = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert not torch.equal(source["model.embed_tokens.weight"], trained["model.embed_tokens.weight"])


def test_a_dry_run_counts_the_training(tmp_path: Path) -> None:
    model, few, many = tiny_model(tmp_path / "model"), tmp_path / "few.yaml", tmp_path / "many.yaml"
    few.write_text(yaml.safe_dump({"method": "dha", "dha": {"fusion_steps": 0, "micro_batch_size": 1}}))
    many.write_text(yaml.safe_dump({"method": "dha", "dha": {"fusion_steps": 10**6, "micro_batch_size": 64}}))
    costs = [
        json.loads(run("fuse", model, "--dry-run", "--json", "--sequence-length", 32, "--config", path))["estimate"]
        for path in (few, many)
    ]
    assert costs[0]["memory_bytes"] < costs[1]["memory_bytes"]
    assert 100 * costs[0]["seconds"] < costs[1]["seconds"]


def test_a_full_budget_trains_nothing(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "out", "--config", options(tmp_path, 1))
    assert torch.equal(logits(model), logits(tmp_path / "out"))


def test_a_text_too_short_to_hold_some_out_trains_without_figures(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    (tmp_path / "short.txt").write_text(" ".join((WORDS * 20)[:60]))
    text = ("--data", tmp_path / "short.txt", "--samples", 4, "--sequence-length", 16)
    line = run("fuse", model, "-o", tmp_path / "out", "--config", options(tmp_path), *text, "--json").splitlines()[-1]
    assert json.loads(line)["nll"]["after"] is None
    assert json.loads((tmp_path / "out/train_log.jsonl").read_text().splitlines()[-1])["nll"] is None


@pytest.mark.parametrize("more", [{}, {"loss": "kl", "start": "subspace", "raw_fusion_loss": True}], ids=["", "kl"])
def test_a_killed_run_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    model, config = tiny_model(tmp_path / "model"), options(tmp_path, "1/4", **more)
    fuse(model, tmp_path / "whole", "--config", config)
    save: Callable[..., None] = stages.Training._save
    for killed_at in (1, 2, 3, 5):  # in the search, at its end, in the first round, in the second
        saves: list[int] = []

        def stop(self: Any, *args: Any, saves: list[int] = saves, killed_at: int = killed_at) -> None:
            save(self, *args)
            saves.append(1)
            if len(saves) == killed_at:
                raise KeyboardInterrupt

        out = tmp_path / f"killed-{killed_at}"
        monkeypatch.setattr(stages.Training, "_save", stop)
        text = ("--data", tmp_path / "text.txt", "--samples", 8, "--sequence-length", 32)
        run("fuse", model, "-o", out, *text, "--config", config, code=130)
        monkeypatch.setattr(stages.Training, "_save", save)
        fuse(model, out, "--config", config, "--resume")
        for name in ("model.safetensors", "plan.json", "train_log.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (killed_at, name)


def test_the_order_of_heads_does_not_matter(tmp_path: Path) -> None:
    """Law 4 for the trained method, with the same groups: the sums run in another order."""
    order = [2, 0, 3, 1]
    for name in ("plain", "permuted"):
        tiny_model(tmp_path / name)

    def permute(attention: Any) -> None:
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            for heads in by_head(projection):
                heads.copy_(heads[order].clone())
        output = attention.o_proj.weight.data.unflatten(1, (4, -1))
        output.copy_(output[:, order].clone())

    edit_heads(tmp_path / "permuted", permute)
    config = options(tmp_path, learning_rate=1e-3)
    fuse(tmp_path / "plain", tmp_path / "plan", "--config", config)
    plan = json.loads((tmp_path / "plan/plan.json").read_text())
    place = {head: index for index, head in enumerate(order)}
    (tmp_path / "plain.json").write_text(json.dumps({**plan, "files": {}, "seal": None}))
    for layer in plan["layers"]:
        for side in ("key_groups", "value_groups"):
            layer[side] = sorted(sorted(place[head] for head in group) for group in layer[side])
    (tmp_path / "permuted.json").write_text(json.dumps({**plan, "files": {}, "seal": None}))
    for name in ("plain", "permuted"):
        short = tmp_path / "short.yaml"
        short.write_text(yaml.safe_dump({"dha": {**SHORT, "learning_rate": 1e-3}}))
        fuse(tmp_path / name, tmp_path / f"{name}-out", "--config", short, "--plan", tmp_path / f"{name}.json")
    assert not torch.allclose(logits(tmp_path / "plain"), logits(tmp_path / "plain-out"), atol=1e-2)
    torch.testing.assert_close(logits(tmp_path / "plain-out"), logits(tmp_path / "permuted-out"), rtol=1e-2, atol=1e-2)


def test_bad_input(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen3")
    text = {"calibration.data": str(tmp_path / "text.txt"), "calibration.sequence_length": 32}
    config = load_config(str(options(tmp_path)), text)
    with pytest.raises(UnsupportedModelError, match="plain key and value projections"):
        headfuse.fuse(str(model), config, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="not gqa"):
        load_config(None, {"method": "dha", "layout": "gqa"})
    with pytest.raises(ConfigError, match="did you mean 'fusion_steps'"):
        load_config(None, {"method": "dha", "dha.fusion_step": 3})
    assert not (tmp_path / "out").exists()


def test_other_methods_take_its_allocator_and_grouping(tmp_path: Path) -> None:
    """The greedy reads the costs that the survey measures; it is not the uniform plan."""
    model = tiny_model(tmp_path / "model", layers=3)

    def louder(attention: Any) -> None:
        if attention.layer_idx == 1:
            attention.v_proj.weight.mul_(10)

    edit_heads(model, louder)
    options = ("--budget", "1/2", "--method", "mean", "--preset", "fast", "--allocator", "dha-greedy")
    document = fuse(model, tmp_path / "out", *options, "--grouping", "anneal")
    assert document["kv_ratio"] == 0.5
    assert document["value_heads"][1] == max(document["value_heads"] + document["key_heads"]) > 2
