"""`--for vllm` with layouts of which vLLM caches one head in each layer, as wide for keys as for values."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from headfuse.layouts.served import in_blocks
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


def test_without_a_layout_it_is_latent_at_the_bytes_of_vllm(model: Path, tmp_path: Path) -> None:
    served = fuse(model, tmp_path / "served", "--for", "vllm", "--preset", "fast", "--budget", "0.5")
    assert served["layout"] == "latent"
    assert "--layout gqa" in served["why_layout"]
    assert served["kv_bytes_per_token_in"]["vllm"] == CACHE / 2


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


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_heads_of_a_width_that_vllms_class_does_not_have_are_refused_before_the_work(
    tmp_path: Path, family: str
) -> None:
    source = tiny_model(tmp_path / "model", family, query_heads=4, head_dim=8)
    options = ("--for", "vllm", "--layout", "gqa", "--head-dim", "16", "-o", tmp_path / "out")
    for command in ("fuse", "analyze"):
        output = " ".join(run(command, source, *options, code=1).split())
        assert f"vLLM does not run model_type '{family}' in layout gqa: its class there has heads of" in output
    assert not (tmp_path / "out").exists()


def test_a_source_with_such_heads_is_refused(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen2", head_dim=16)  # hidden_size 32, 4 query heads
    line = ("fuse", source, "--for", "vllm", "--layout", "gqa", "-o", tmp_path / "out")
    output = " ".join(run(*line, code=1).split())
    assert "hidden_size / num_attention_heads = 8 channels only" in output


@pytest.mark.parametrize(
    ("channels", "kinds", "expected"),
    [
        ([96, 128, 64], "sss", 288),  # layers of one kind: each its own size
        ([96, 128, 64], "sfs", 320),  # 96 does not divide 128
        ([64] * 5, "sfsfs", 64 * 6),  # two layers in a block: three of a kind need two blocks
        ([64] * 7, "sfsfsfs", 64 * 8),  # four in a block
        ([64, 64, 32, 64, 64], "sfsff", 64 * 4 + 32),  # one in a block
    ],
)
def test_layers_of_several_kinds_share_blocks_in_vllm(channels: list[int], kinds: str, expected: int) -> None:
    assert in_blocks(channels, kinds) == expected


def test_what_vllm_pads_is_counted_where_full_attention_and_windows_are_mixed(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "gemma3_text", layers=5, head_dim=32)
    (tmp_path / "options.yaml").write_text(
        "budget: {key_heads: [1, 2, 1, 2, 3], value_heads: [3, 2, 3, 4, 3]}\npreset: fast\n"
    )
    document = fuse(source, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert document["kv_bytes_per_token_in"]["vllm"] == 4 * 2 * (3 * 128 + 128 + 64)  # windows: 96 channels in 128
    assert document["source_kv_bytes_per_token_in"]["vllm"] == 4 * 2 * 128 * 6  # two blocks of two for three layers
    assert "| KV bytes per token in vLLM | 6144 | 4608 |" in (tmp_path / "out/README.md").read_text()


def test_no_layer_keeps_fewer_channels_than_vllm_caches(model: Path, tmp_path: Path) -> None:
    """Steps of widths are 8 channels here, and vLLM caches 32 for a layer that keeps fewer."""
    fuse(model, tmp_path / "served", "--for", "vllm", "--preset", "fast", "--budget", "0.5")
    options = (tmp_path / "served/headfuse.yaml").read_text()
    assert yaml.safe_load(options)["budget"]["min_channels"] == 32
    (tmp_path / "options.yaml").write_text("budget: {total: 0.5, min_channels: 64}\npreset: fast\n")
    even = fuse(model, tmp_path / "even", "--config", tmp_path / "options.yaml")
    assert {*even["key_channels"], *even["value_channels"]} == {64}
