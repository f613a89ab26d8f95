"""Validation text, early stopping, and the best weights."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from headfuse.checkpoint.checksums import file_sha256
from headfuse.evaluation.perplexity import nll_per_window
from headfuse.models.loading import load_model, load_tokenizer
from headfuse.text.documents import read_documents
from headfuse.text.windows import token_windows
from tests.training.runs import WORDS, Stop, records, stop_at, train


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


def test_the_layerwise_stage_does_not_exceed_the_patience(fused: Path, data: str, tmp_path: Path) -> None:
    """In it layers learn alone, and the model as a whole may get worse."""
    options: dict[str, Any] = {"tokens": 40 * 32, "learning_rate": 0.2, "patience": 1, "dtype": "float32"}
    result = train(fused, data, **options, layerwise=0.5, output=tmp_path / "out")
    found = {line["step"]: line["nll"] for line in records(result.output) if line["event"] == "validation"}
    assert found[10] > found[5] or found[15] > min(found[5], found[10])  # patience would end here
    assert result.steps > 20


def test_separate_documents_are_validated_apart(fused: Path, source: Path, data: str, tmp_path: Path) -> None:
    """The NLL is that of models which read one document after the other."""
    sentences = [" ".join(WORDS[i : i + length]) for i, length in enumerate((3, 5, 4, 2, 6, 3, 4, 5))]
    text = tmp_path / "short.jsonl"
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences * 8))
    options: dict[str, Any] = {"teacher": str(source), "packing": "separate", "tokens": 32, "dtype": "float32"}
    plain = train(fused, data, **options, validation_data=str(text), output=tmp_path / "out")
    cached = train(
        fused, data, **options, validation_data=str(text), output=tmp_path / "cached", teacher_cache=tmp_path / "cache"
    )
    windows = token_windows(read_documents(str(text)), load_tokenizer(fused), 16, 16)
    for folder, found in ((fused, plain.nll_before), (source, plain.nll_teacher), (source, cached.nll_teacher)):
        model, lost = load_model(folder, device="cpu"), []
        for window in windows:
            ends = [0, *(i + 1 for i, token in enumerate(window.tolist()) if token == 1), len(window)]
            parts = [window[a:b] for a, b in pairwise(ends) if b > a]
            logits = torch.cat([model(part[None]).logits[0] for part in parts])
            lost.append(cross_entropy(logits[:-1].float(), window[1:]).item())
        assert found == pytest.approx(sum(lost) / len(lost), abs=1e-5)


def test_validation_text_of_its_own(fused: Path, data: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(" ".join(WORDS * 20))
    result = train(fused, data, validation_data=str(tmp_path / "other.txt"), validation_windows=7)
    windows = token_windows(read_documents(str(tmp_path / "other.txt")), load_tokenizer(fused), 16, 7)
    expected = nll_per_window(load_model(tmp_path / "source", device="cpu"), windows).mean().item()
    assert result.nll_teacher == pytest.approx(expected, abs=1e-6)
    assert "7 windows of 16 tokens of `other.txt`" in (result.output / "README.md").read_text()
