"""Laws of folders: what every layout writes reloads, decodes, and needs no headfuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import headfuse
from headfuse.layouts import LAYOUTS
from tests.laws.tables import FAMILIES, read_plan, skip_misfit
from tests.support.commands import fuse
from tests.support.model_outputs import assert_decoding_equals_forward, logits
from tests.support.tiny_models import tiny_model


# 6, 7
@pytest.fixture(scope="module", params=[(family, layout) for family in FAMILIES for layout in LAYOUTS])
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with half of the cache, and what `fuse` said about it."""
    folder = tmp_path_factory.mktemp("-".join(request.param))
    model = tiny_model(folder / "model", request.param[0], query_heads=8)
    skip_misfit(request.param[1], model)
    return folder / "out", fuse(model, folder / "out", "--budget", "0.5", "--layout", request.param[1])


def test_saved_folder_reloads_and_its_cache_is_the_promised_one(fused: tuple[Path, dict[str, Any]]) -> None:
    out, document = fused
    import headfuse.modeling  # noqa: F401  registers decoupled models

    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.randint(300, (1, 12))
    with torch.no_grad():
        cache = loaded(tokens, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == document["key_heads"]
    assert [layer.values.shape[1] for layer in cache.layers] == document["value_heads"]
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    plan = read_plan(out)
    assert nbytes == 12 * plan.kv_bytes_per_token(4) == 12 * document["kv_bytes_per_token"]["after"]
    assert document["kv_bytes_per_token"]["after"] / document["kv_bytes_per_token"]["before"] == document["kv_ratio"]


def left_padded(tokens: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last tokens of each row, zeros before them; with the attention mask."""
    width = tokens.shape[1]
    mask = torch.tensor([[int(i >= width - length) for i in range(width)] for length in lengths])
    return tokens * mask, mask


def test_cached_decoding_equals_the_full_pass(fused: tuple[Path, dict[str, Any]]) -> None:
    loaded, lengths = headfuse.load(fused[0]), [24, 19, 3]
    tokens, mask = left_padded(torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(0)), lengths)
    assert_decoding_equals_forward(loaded, tokens, mask, lengths)


GENERATE: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def test_generate_with_cache_padding_and_beams(fused: tuple[Path, dict[str, Any]]) -> None:
    loaded = headfuse.load(fused[0])
    tokens, mask = left_padded(torch.randint(1, 300, (2, 18), generator=torch.Generator().manual_seed(0)), [18, 7])
    for beams in (1, 3):
        options = {**GENERATE, "num_beams": beams}
        with torch.no_grad():
            both = loaded.generate(tokens, attention_mask=mask, **options)
            alone = loaded.generate(tokens[1:, -7:], attention_mask=mask[1:, -7:], **options)
            uncached = loaded.generate(tokens, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(both[1, -5:], alone[0, -5:])
        assert torch.equal(both, uncached)


def test_folders_work_where_headfuse_is_not_installed(tmp_path: Path) -> None:
    model, expected = tiny_model(tmp_path / "model", "qwen2", query_heads=8), {}
    tokens, mask = left_padded(torch.randint(1, 300, (2, 18), generator=torch.Generator().manual_seed(0)), [18, 7])
    for layout in LAYOUTS:
        fuse(model, tmp_path / layout, "--budget", "0.25", "--layout", layout)
        loaded = headfuse.load(tmp_path / layout)
        generated = loaded.generate(tokens, attention_mask=mask, num_beams=2, **GENERATE)
        expected[layout] = logits(tmp_path / layout), generated
    torch.save({"expected": expected, "tokens": tokens, "mask": mask, "options": GENERATE}, tmp_path / "expected.pt")
    script = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *args):
        if name.split(".")[0] == "headfuse":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
saved = torch.load("expected.pt")
fixed = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
for layout, (logits, generated) in saved["expected"].items():
    model = AutoModelForCausalLM.from_pretrained(layout, trust_remote_code=layout != "gqa")
    stock = type(model).__module__ == "transformers.models.qwen2.modeling_qwen2"
    assert stock == (layout == "gqa"), type(model)
    with torch.no_grad():
        torch.testing.assert_close(model(fixed).logits, logits)
    beams = model.generate(saved["tokens"], attention_mask=saved["mask"], num_beams=2, **saved["options"])
    assert torch.equal(beams, generated), layout
"""
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
