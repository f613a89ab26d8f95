"""`--for vllm` with layouts of which vLLM caches one head in each layer, as wide for keys as for values."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from headfuse.modeling.configuration_headfuse import one_head_width
from headfuse.plan import one_head_width as planned_width
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

CACHE = 2 * 4 * 32 * 2 * 4  # layers, heads, channels, keys and values, bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("source") / "model", head_dim=32)


@pytest.mark.parametrize("layout", ["decoupled", "latent"])
def test_a_budget_counts_what_vllm_caches(model: Path, tmp_path: Path, layout: str) -> None:
    options = ("--layout", layout, "--preset", "fast", "--budget", "0.5")
    free = fuse(model, tmp_path / "free", *options)
    wide = [max(pair) for pair in zip(free["key_channels"], free["value_channels"], strict=True)]
    assert free["kv_bytes_per_token_in"] == {
        "transformers": free["kv_bytes_per_token"]["after"], "vllm": 4 * 2 * sum(wide),
    }  # fmt: skip
    served = fuse(model, tmp_path / "served", *options, "--for", "vllm")
    assert served["layout"] == layout
    assert served["key_channels"] == served["value_channels"]
    assert served["kv_bytes_per_token_in"]["vllm"] == CACHE / 2
    assert yaml.safe_load((tmp_path / "served/headfuse.yaml").read_text())["budget"]["layerwise"] is True


def test_the_card_says_it_where_it_differs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("budget: {key_heads: [1, 2], value_heads: [4, 2]}\npreset: fast\n")
    for arguments in ((), ("--for", "vllm", "--layout", "decoupled")):  # counts stay as they were given
        fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml", "--overwrite", *arguments)
        assert "| KV bytes per token in vLLM | 2048 | 1536 |" in (tmp_path / "out/README.md").read_text()
    fuse(model, tmp_path / "out", "--layout", "gqa", "--budget", "0.5", "--preset", "fast", "--overwrite")
    assert "in vLLM" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("family", ["bloom", "gpt_oss", "gptj"])
def test_a_family_that_vllm_does_not_run_is_refused_before_the_work(tmp_path: Path, family: str) -> None:
    source = tiny_model(tmp_path / "model", family)
    for command in ("fuse", "analyze"):
        output = run(command, source, "--for", "vllm", "--layout", "decoupled", "-o", tmp_path / "out", code=1)
        assert f"vLLM does not run model_type '{family}' in layout decoupled" in " ".join(output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_the_plan_and_the_model_code_count_the_same() -> None:
    shapes = [(keys, values) for keys in range(1, 300, 7) for values in range(1, 300, 11)]
    assert [planned_width(*shape) for shape in shapes] == [one_head_width(*shape) for shape in shapes]
