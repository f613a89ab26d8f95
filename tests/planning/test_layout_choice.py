"""Which layout a model gets where none is named: the first that goes with the model and the other options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import headfuse
from headfuse.choices import DEFAULT_LAYOUTS, Layout, Runtime
from headfuse.config.fuse import FuseConfig
from headfuse.errors import ConfigError, HeadfuseError, UnsupportedModelError
from headfuse.models.families import ARCHITECTURES
from headfuse.planning.layout_choice import with_layout
from tests.support.commands import run
from tests.support.plans import plan_of
from tests.support.tiny_models import tiny_config, tiny_model

COUNT_HEADS: dict[str, dict[str, Any]] = {
    "mean": {"method": "mean"},
    "first": {"method": "first"},
    "align": {"method": "align"},
    "taylor": {"budget": {"allocator": "taylor"}},
    "shapley": {"budget": {"allocator": "shapley"}},
    "neighbours": {"grouping": "neighbours"},
    "anneal": {"grouping": "anneal"},
    "counts": {"budget": {"key_heads": [1, 2], "value_heads": [2, 2]}},
    "fewest keys": {"budget": {"min_key_heads": 2}},
    "fewest values": {"budget": {"min_value_heads": 2}},
}
"""Options that go with heads of the source's width alone."""
SMALL = ("--samples", 8, "--sequence-length", 32)


def chosen(options: dict[str, Any], family: str = "llama", runtime: Runtime | None = None) -> tuple[str, str | None]:
    settings, why = with_layout(FuseConfig.model_validate(options), tiny_config(family), runtime)
    return settings.layout, why


def dry(model: Path, *args: object) -> dict[str, Any]:
    line = run("fuse", model, "--data", model.parent / "text.txt", *SMALL, "--dry-run", "--json", *args)
    document: dict[str, Any] = json.loads(line.splitlines()[-1])
    return document


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_default_is_latent_where_linear_maps_may_mix_values(family: str) -> None:
    layout, why = chosen({}, family)
    assert layout == ("decoupled" if family == "olmo" else "latent")  # whose keys and values are clamped
    assert (why is None) == (layout == "latent")


@pytest.mark.parametrize("options", COUNT_HEADS.values(), ids=COUNT_HEADS)
def test_options_of_single_heads_get_decoupled(options: dict[str, Any]) -> None:
    layout, why = chosen(options)
    assert layout == "decoupled"
    assert why is not None
    assert why.startswith("not latent (")
    with pytest.raises(ConfigError):  # nobody asked for decoupled here
        chosen({**options, "layout": "latent"})


@pytest.mark.parametrize(
    "options",
    [
        {"budget": {"total": {"key": "1/4", "value": "1/2"}}}, {"budget": {"keep_layers": [0]}},
        {"budget": {"layerwise": True}}, {"budget": {"allocator": "uniform"}}, {"budget": {"allocator": "dha-greedy"}},
        {"budget": {"cross_layer": 1}}, {"grouping": "cluster"}, {"method": "subspace"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_latent_takes_leave_it_the_default(options: dict[str, Any]) -> None:
    assert chosen(options) == ("latent", None)


def test_method_dha_is_decoupled_before_any_model_is_read() -> None:
    assert FuseConfig.model_validate({"method": "dha"}).layout == "decoupled"
    for runtime in (None, "vllm"):
        assert chosen({"method": "dha"}, runtime=runtime) == ("decoupled", None)


def test_a_layout_that_is_named_stays(model: Path) -> None:
    for layout in ("decoupled", "layerwise", "gqa", "latent"):
        assert chosen({"layout": layout}) == (layout, None)
    with pytest.raises(UnsupportedModelError, match="clamps its keys and values"):
        chosen({"layout": "latent"}, "olmo")
    assert dry(model, "--layout", "decoupled")["why_layout"] is None


def test_no_layout_fits(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"latent \(model_type 'olmo' clamps .*; decoupled \(--cross-layer"):
        chosen({"budget": {"cross_layer": 1}}, "olmo")
    with pytest.raises(HeadfuseError, match=r"no layout fits: .*and layout gqa gives both the same heads"):
        chosen({"budget": {"total": {"key": "1/4", "value": "1/2"}}}, "llama", "vllm")
    with pytest.raises(UnsupportedModelError, match=r"no layout fits: latent .*it leaves out ALiBi"):
        chosen({}, "bloom", "vllm")
    assert "add --layout gqa" in run("fuse", model, "--head-dim", "16", "--dry-run", code=1)


@pytest.mark.parametrize(
    ("runtime", "family", "options", "layout"),
    [
        ("transformers", "llama", {}, "latent"), ("transformers", "olmo", {}, "decoupled"),
        ("transformers", "llama", {"budget": {"head_dim": "auto"}}, "gqa"),
        ("vllm", "llama", {}, "latent"), ("vllm", "qwen3", {}, "latent"), ("vllm", "olmo", {}, "decoupled"),
        ("vllm", "gpt_oss", {}, "gqa"),
        ("vllm", "llama", {"budget": {"head_dim": "auto"}}, "gqa"),
        ("llama.cpp", "llama", {}, "gqa"), ("sglang", "qwen3", {}, "gqa"),
        ("sglang", "llama", {"method": "mean"}, "gqa"),
    ],
)  # fmt: skip
def test_for_takes_the_first_that_fits(runtime: Runtime, family: str, options: dict[str, Any], layout: Layout) -> None:
    found, why = chosen(options, family, runtime)
    assert found == layout
    assert why is not None
    assert f"the first that fits of those for {runtime}" in why
    assert ("give --layout gqa" in why) == (runtime == "vllm" and layout != "gqa")


def test_command_line_yaml_and_python_choose_the_same(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mean.yaml").write_text("method: mean\npreset: fast\n")
    text = {"data": str(model.parent / "text.txt"), "samples": 8, "sequence_length": 32}
    result = headfuse.fuse(str(model), method="mean", preset="fast", output=tmp_path / "python", **text)
    assert result.plan.layout == "decoupled"
    for given in (("--method", "mean"), ("--config", tmp_path / "mean.yaml")):
        document = dry(model, *given)
        assert document["layout"] == "decoupled"
        assert "method mean makes no wide heads" in document["why_layout"]
    assert headfuse.analyze(str(model), preset="fast", **text).plan.layout == "latent"
    for command in ("fuse", "analyze"):
        out = ("-o", tmp_path / command, "--method", "mean", "--preset", "fast")
        shown = run(command, model, *out, "--data", text["data"], *SMALL)
        assert "layout decoupled: not latent (--method: method mean makes no wide heads)" in " ".join(shown.split())
        assert plan_of(tmp_path / command)["layout"] == "decoupled"


def test_a_model_by_default_from_fuse_to_eval(model: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", ("--data", model.parent / "text.txt", *SMALL)
    shown = run("fuse", model, "-o", out, *text, "--budget", "1/2")
    assert "layout latent\nkey channels per layer" in shown
    assert plan_of(out)["layout"] == yaml.safe_load((out / "headfuse.yaml").read_text())["layout"] == "latent"
    document = json.loads(run("eval", out, "--baseline", model, *text, "--verify", "--json").splitlines()[-1])
    assert document["kv_ratio"] == 0.5
    assert document["comparison"]["nll_gap"] < 1


def test_a_reviewed_plan_names_the_layout(model: Path, tmp_path: Path) -> None:
    text = ("--data", model.parent / "text.txt", *SMALL)
    run("analyze", model, *text, "--layout", "decoupled", "--preset", "fast", "-o", tmp_path / "plan")
    plan = ("--plan", tmp_path / "plan/plan.json")
    assert dry(model, *plan)["layout"] == "decoupled"
    assert dry(model, *plan, "--for", "vllm")["layout"] == "decoupled"
    assert "contradict the plan in layout" in run("fuse", model, *text, *plan, "--layout", "latent", code=1)
    assert "does not load layout decoupled" in run("fuse", model, *text, *plan, "--for", "sglang", code=1)


@pytest.mark.parametrize("name", ["headfuse-25", "headfuse-50"])
def test_packaged_configs_have_the_default_layout(model: Path, tmp_path: Path, name: str) -> None:
    assert dry(model, "--config", name)["layout"] == DEFAULT_LAYOUTS[0]
    assert dry(tiny_model(tmp_path / "model", "olmo"), "--config", name)["layout"] == "decoupled"
    assert dry(model, "--config", name, "--for", "llama.cpp")["layout"] == "gqa"
