"""The teacher: found, checked, cached."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headfuse.checkpoint.locks import locked
from headfuse.errors import ConfigError, OutputError
from headfuse.models.loading import load_model
from tests.training.runs import WORDS, losses, train, write_source


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

    for module in ("uptrain", "teacher"):
        monkeypatch.setattr(sys.modules[f"headfuse.training.{module}"], "load_model", load)
    second = train(fused, data, output=tmp_path / "second", teacher_cache=cache, **options)
    assert loaded == [fused]
    assert first.nll_teacher == second.nll_teacher == pytest.approx(live.nll_teacher, abs=1e-6)
    assert losses(first.output) == losses(second.output)
    for a, b in zip(losses(live.output), losses(first.output), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    train(fused, data, output=tmp_path / "third", teacher_cache=cache, **options, seed=1)  # another order
    assert loaded == [fused, fused, tmp_path / "source"]
    with pytest.raises(ConfigError, match="only the teacher's last hidden states"):
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


def test_a_cache_that_was_cut_off_is_filled_anew(fused: Path, data: str, tmp_path: Path) -> None:
    """A mapped file is as long as it is asked to be: what is missing would be read as zeros."""
    cache = tmp_path / "cache"
    whole = train(fused, data, output=tmp_path / "whole", teacher_cache=cache)
    (cache / "hidden.bin").write_bytes((cache / "hidden.bin").read_bytes()[:-100])
    again = train(fused, data, output=tmp_path / "again", teacher_cache=cache)
    assert losses(whole.output) == losses(again.output)


def test_two_runs_do_not_fill_one_cache(fused: Path, data: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with locked(cache), pytest.raises(OutputError, match="choose another --teacher-cache"):
        train(fused, data, output=tmp_path / "out", teacher_cache=cache)
    train(fused, data, output=tmp_path / "out", teacher_cache=cache)


def test_teacher_in_another_dtype(fused: Path, data: str, tmp_path: Path) -> None:
    full = train(fused, data, output=tmp_path / "full")
    half = train(fused, data, output=tmp_path / "half", teacher_dtype="bfloat16", teacher_device="cpu")
    assert losses(half.output) != losses(full.output)
    assert half.nll_teacher == pytest.approx(full.nll_teacher, abs=0.02)


def test_products_in_bfloat16_train_nearly_the_same_model(fused: Path, data: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "tokens": 20 * 32}
    plain = train(fused, data, output=tmp_path / "plain", **options)
    said = train(fused, data, output=tmp_path / "said", compute_dtype="float32", **options)
    narrower = train(fused, data, output=tmp_path / "narrower", compute_dtype="bfloat16", **options)
    assert losses(said.output) == losses(plain.output)  # the default of a CPU
    assert losses(narrower.output) != losses(plain.output)
    assert narrower.nll_teacher != plain.nll_teacher  # the teacher's products, too
    assert narrower.nll_after == pytest.approx(plain.nll_after, abs=0.02)
    exact = train(fused, data, output=tmp_path / "exact", compute_dtype="bfloat16", teacher_dtype="float32", **options)
    assert exact.nll_teacher == plain.nll_teacher
    weights = load_file(narrower.output / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[name], weights[name].bfloat16().float())  # they are trained in float32


def test_teacher_is_found_beside_the_model_or_in_the_working_directory(
    fused: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(fused, data).teacher == "source"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "source").rename(tmp_path / "elsewhere" / "source")
    with pytest.raises(ConfigError, match="the teacher was not found"):
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


def test_model_without_a_plan_needs_a_teacher(fused: Path, data: str) -> None:
    (fused / "plan.json").unlink()
    with pytest.raises(ConfigError, match="names its source") as caught:
        train(fused, data)
    assert "--teacher" in str(caught.value)
