"""Layout latent from the command on: its plans, budgets and refusals, and every command that reads its folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import headfuse
from headfuse.fusion.key_channels import KeyChannels
from headfuse.models.families import READ_MAPS
from headfuse.plan import FusionPlan
from tests.support.commands import fuse, run
from tests.support.model_outputs import logits
from tests.support.plans import plan_of, with_layers
from tests.support.planted_heads import plant
from tests.support.tiny_models import tiny_model

LATENT = ("--layout", "latent", "--preset", "fast")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with half of the cache of the model beside it."""
    folder = tmp_path_factory.mktemp("latent")
    model = tiny_model(folder / "model", "qwen2", query_heads=8)
    return folder / "out", fuse(model, folder / "out", "--budget", "0.5", *LATENT)


def wide(groups: list[list[int]], keys: list[int], values: list[int], slots: list[list[int]]) -> dict[str, Any]:
    sides = {"key_groups": groups, "value_groups": groups}
    return {**sides, "key_widths": keys, "value_widths": values, "rotary_slots": slots}


WHOLE = [[0, 1, 2, 3]]
STOCK = [0, 1, 2, 3]


@pytest.mark.parametrize("budget", ["0.3", "3/8", "5/8", "0.99"])
def test_any_budget_is_met_to_within_a_quantum(tmp_path: Path, budget: str) -> None:
    document = fuse(tiny_model(tmp_path / "model"), tmp_path / "out", "--budget", budget, *LATENT)
    channels, full = sum(document["key_channels"] + document["value_channels"]), 2 * 2 * 32
    top, _, bottom = budget.partition("/")
    assert abs(channels - full * float(top) / float(bottom or 1)) <= 4  # half of a quantum of 8
    assert document["kv_ratio"] == channels / full
    assert document["kv_bytes_per_token"]["after"] == 4 * channels


def test_one_heads_width_holds_equal_heads(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    plant(model, WHOLE)
    document = fuse(model, tmp_path / "out", "--budget", "1/4", *LATENT)
    assert document["key_channels"] == document["value_channels"] == [8, 8]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=5e-5, atol=5e-5)


def test_groups_of_a_reviewed_plan(half: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Groups in any order, with widths of their own: each caches what its equal heads need."""
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    plant(model, [[0, 3], [1, 2]])
    pairs = wide([[3, 0], [2, 1]], [8, 8], [8, 8], [STOCK, STOCK])
    uneven = wide([[1], [3, 0, 2]], [8, 16], [8, 16], [STOCK, [0, 0, 1, 1, 2, 2, 3, 3]])
    path = with_layers(plan_of(half[0]), tmp_path / "plan.json", pairs, uneven)
    document = fuse(model, tmp_path / "out", "--plan", path, "--preset", "fast")
    assert (document["key_channels"], document["value_channels"]) == ([16, 24], [16, 24])
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=5e-5, atol=5e-5)


def test_a_plan_is_applied_as_it_was_made(half: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    model, out = half[0].parent / "model", tmp_path / "out"
    fuse(model, out, "--plan", half[0] / "plan.json", "--preset", "fast")
    first, second = (load_file(folder / "model.safetensors") for folder in (half[0], out))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert plan_of(out)["layers"] == plan_of(half[0])["layers"]
    fuse(model, tmp_path / "again", "--config", out / "headfuse.yaml")
    assert plan_of(tmp_path / "again")["layers"] == plan_of(half[0])["layers"]


BAD: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda layer: layer.update(value_groups=[[0, 1], [2, 3]]), "key_groups equal to value_groups"),
    (lambda layer: layer.update(key_widths=None), "one entry per group"),
    (lambda layer: layer.update(value_widths=[33]), "widths up to 32"),
    (lambda layer: layer.update(key_widths=[0]), "at least 1"),
    (lambda layer: layer.update(rotary_slots=[[4]], key_widths=[2], still_planes=0), "from 0 to 3"),
    (lambda layer: layer.update(rotary_slots=[[1, 1, 1, 1, 1]], key_widths=[10]), "each at most 4 times"),
    (lambda layer: layer.update(rotary_slots=[[0]], key_widths=[8], still_planes=0), "cannot have 1 rotary slots"),
    (lambda layer: layer.update(still_planes=5), "still_planes: at most 4"),
    (lambda layer: layer.update(key_widths=None, value_widths=None, rotary_slots=None), "are missing"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[message for _, message in BAD])
def test_plans_that_no_layer_of_wide_heads_can_follow(
    half: tuple[Path, dict[str, Any]], tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    plan = plan_of(half[0])
    damage(plan["layers"][1])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    output = run("fuse", half[0].parent / "model", "--plan", tmp_path / "plan.json", code=1)
    assert message in " ".join(output.split())


def test_widths_are_of_layout_latent_alone(half: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({**plan_of(half[0]), "layout": "decoupled"}))
    output = run("fuse", half[0].parent / "model", "--plan", tmp_path / "plan.json", code=1)
    assert "heads of the source's width only" in " ".join(output.split())


@pytest.mark.parametrize("field", ["key_widths", "value_widths"])
def test_other_layouts_write_no_widths(tmp_path: Path, field: str) -> None:
    fuse(tiny_model(tmp_path / "model"), tmp_path / "out", "--budget", "0.5", "--preset", "fast")
    assert field not in (tmp_path / "out" / "plan.json").read_text()


REFUSED = {
    "--method mean": "makes no wide heads",
    "--allocator taylor": "scores single heads",
    "--for sglang": "sglang does not load layout latent",
    "--budget 1/1000": "quanta of 8 channels",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_do_not_go_with_wide_heads(tmp_path: Path, options: str) -> None:
    model = tiny_model(tmp_path / "model")
    line = ("fuse", model, "--data", tmp_path / "text.txt", "--sequence-length", 32, "--layout", "latent")
    assert REFUSED[options] in " ".join(run(*line, *options.split(), code=1).split())


@pytest.mark.parametrize("rule", ["key_heads: [1, 1]", "min_value_heads: 2"])
def test_rules_that_count_heads_are_refused(tmp_path: Path, rule: str) -> None:
    model = tiny_model(tmp_path / "model")
    (tmp_path / "options.yaml").write_text(f"layout: latent\nbudget: {{{rule}}}\n")
    output = " ".join(run("fuse", model, "--config", tmp_path / "options.yaml", code=1).split())
    assert f"budget.{rule.partition(':')[0]}: counts heads" in output
    assert "layout decoupled" in output


def test_a_family_whose_values_cannot_be_mixed(tmp_path: Path) -> None:
    output = " ".join(run("fuse", tiny_model(tmp_path / "model", "olmo"), "--layout", "latent", code=1).split())
    assert "clip_qkv" in output
    assert "choose --layout decoupled" in output


def test_layers_that_are_kept_are_copied(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    (tmp_path / "options.yaml").write_text("layout: latent\npreset: fast\nbudget: {total: 0.75, keep_layers: [1]}\n")
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml")
    source, fused = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    same = {name for name in source if source[name].equal(fused[name])}
    attention = {name for name in source if "layers.0.self_attn" in name}
    queries = {name for name in attention if "q_proj" in name}
    assert source.keys() - same - queries == attention - queries
    order = KeyChannels(8, plan_of(tmp_path / "out")["layers"][0]["still_planes"]).order(8)
    for name in queries:
        assert torch.equal(source[name].unflatten(0, (8, 8))[:, order].flatten(0, 1), fused[name])
    headfuse.load(tmp_path / "out")


def test_every_command_reads_the_folder(half: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, document = half
    model, text = out.parent / "model", ("--data", out.parent / "text.txt", "--sequence-length", 32)
    figures = json.loads(
        run("eval", out, "--baseline", model, *text, "--samples", 4, "--verify", "--json").splitlines()[-1]
    )
    assert figures["model"]["kv_bytes_per_token"] == document["kv_bytes_per_token"]["after"] == 4 * 64
    assert figures["kv_ratio"] == 0.5
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    run("report", out, "--figures", tmp_path / "figures.json", "-o", tmp_path / "r.html")
    assert "channels in the cache" in (tmp_path / "r.html").read_text()
    assert "key channels" in (out / "README.md").read_text()
    assert {path.name for path in out.glob("*.py")} == {
        "configuration_family.py", "configuration_headfuse.py", "configuration_latent.py", "modeling_stock.py",
        "modeling_decode_step.py", "modeling_headfuse.py", "modeling_one_head.py", "modeling_latent.py",
        "modeling_cross_layer.py", "modeling_shared_states.py",
    }  # fmt: skip
    run("uptrain", out, "-o", tmp_path / "trained", *text, "--tokens", 64, "--batch-size", 1, "--loss", "ce", "-q")
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "trained/model.safetensors")
    assert before.keys() == after.keys()
    maps = [name for name in before if name.endswith(READ_MAPS)]
    assert len(maps) == 2 * len(READ_MAPS)
    assert not any(torch.equal(before[name], after[name]) for name in maps)
    assert "is already a model with heads of its own" in " ".join(run("fuse", out, *text, code=1).split())


def test_a_dry_run_promises_what_is_written(half: tuple[Path, dict[str, Any]]) -> None:
    out, document = half
    options = ("--data", out.parent / "text.txt", "--samples", 8, "--sequence-length", 32, "--budget", "0.5")
    line = ("fuse", out.parent / "model", "-o", out.parent / "dry", *options, *LATENT, "--dry-run", "--json")
    promised = json.loads(run(*line).splitlines()[-1])
    assert promised["kv_bytes_per_token"] == document["kv_bytes_per_token"]
    assert promised["estimate"]["seconds"] > 0


def test_analyze_proposes_widths(half: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    model, text = half[0].parent / "model", half[0].parent / "text.txt"
    line = ("analyze", model, "--data", text, "--samples", 8, "--sequence-length", 32, "--budget", "0.5", *LATENT)
    document = json.loads(run(*line, "--json", "-o", tmp_path / "out").splitlines()[-1])
    plan = FusionPlan.from_json((tmp_path / "out/plan.json").read_text())
    assert [layer["key"]["channels"] for layer in document["layers"]] == plan.key_channels
    assert plan.layers == FusionPlan.from_json((half[0] / "plan.json").read_text()).layers
