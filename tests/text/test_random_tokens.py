"""Windows of random tokens in the calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import headfuse
from headfuse.checkpoint.plan_file import read_plan
from headfuse.config.fuse import CalibrationConfig
from headfuse.conversion import refine
from headfuse.conversion.refine import Targets
from headfuse.errors import ConfigError
from headfuse.models.source import Source
from headfuse.plan import FusionPlan
from headfuse.text.random_tokens import ordinary_tokens, random_windows
from tests.support.commands import fuse
from tests.support.tiny_models import VOCABULARY, tiny_model

TOKENS = torch.arange(100, 120)


def test_every_token_is_drawn_and_a_seed_repeats() -> None:
    windows = random_windows(60, 10, TOKENS, None, seed=0)
    assert set(windows.flatten().tolist()) == set(TOKENS.tolist())
    assert torch.equal(random_windows(60, 10, TOKENS, None, seed=0), windows)
    assert not torch.equal(random_windows(60, 10, TOKENS, None, seed=1), windows)


def test_they_begin_with_bos_as_text_does() -> None:
    windows = random_windows(4, 11, TOKENS, 3, seed=0)
    assert windows.shape == (4, 11)
    assert (windows[:, 0] == 3).all()
    assert (windows[:, 1:] != 3).all()


def test_special_and_unembedded_tokens_are_not_drawn(tokenizer: PreTrainedTokenizerFast) -> None:
    everything = set(tokenizer.get_vocab().values())
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert set(ordinary_tokens(tokenizer).tolist()) == everything - special
    assert set(ordinary_tokens(tokenizer, {7: "a", 8: "b"}).tolist()) == everything - special - {7, 8}


@pytest.mark.parametrize(
    ("samples", "share", "random"),
    [(16, 1 / 4, 4), (16, 0, 0), (16, 1 / 2, 12), (64, 1 / 3, 28), (2, 0.5, 2), (3, 0.9, 18), (16, 0.01, 0)],
)
def test_they_join_the_text_and_take_none_of_it(tmp_path: Path, samples: int, share: float, random: int) -> None:
    source = Source.open(str(tiny_model(tmp_path / "model")))
    calibration = CalibrationConfig(samples=samples, sequence_length=16, random_tokens=share)
    text, plain = (
        source.calibration_text(each, 0)
        for each in (calibration, calibration.model_copy(update={"random_tokens": 0.0}))
    )
    assert torch.equal(text.statistics, plain.statistics)
    assert torch.equal(text.fitted.statistics[: len(text.statistics)], text.statistics)
    assert len(text.fitted.statistics) - len(text.statistics) == random
    assert len(text.fitted.starts) == len(text.fitted.statistics) * len(text.starts) // len(text.statistics)
    assert torch.equal(text.held_out, plain.held_out)


@pytest.mark.parametrize(("bundled", "random"), [(True, 4), (False, 0)])
def test_they_are_a_quarter_beside_the_bundled_text_and_none_beside_your_own(
    tmp_path: Path, bundled: bool, random: int
) -> None:
    source = Source.open(str(tiny_model(tmp_path / "model")))
    data = "default" if bundled else str(tmp_path / "text.txt")
    text = source.calibration_text(CalibrationConfig(data=data, samples=16, sequence_length=16), 0)
    assert len(text.statistics) == 12
    assert len(text.fitted.statistics) == 12 + random


def test_a_short_text_has_fewer_of_them(tmp_path: Path) -> None:
    source, short = Source.open(str(tiny_model(tmp_path / "model"))), tmp_path / "short.txt"
    short.write_text((tmp_path / "text.txt").read_text()[:1000])
    calibration = CalibrationConfig(data=str(short), samples=1000, sequence_length=16, random_tokens=0.5)
    text = source.calibration_text(calibration, 0)
    assert text.random is not None
    assert 0 < len(text.random) <= len(text.statistics) + len(text.held_out)
    assert len(text.statistics) < 100


@pytest.mark.parametrize("layout", ["latent", "decoupled", "gqa"])
def test_a_plan_is_made_on_text_alone(tmp_path: Path, layout: str) -> None:
    model, plans = tiny_model(tmp_path / "model"), list[FusionPlan]()
    for share in ("0", "2/3"):
        fuse(model, tmp_path / share[0], "--layout", layout, "--random-tokens", share, "--samples", 16)
        plans.append(read_plan(tmp_path / share[0]))
    assert plans[0].layers == plans[1].layers
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("0", "2")]
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_model_is_refined_on_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Targets]()

    def noted(*arguments: Any, **options: Any) -> None:
        seen.extend(each for each in arguments if isinstance(each, Targets))

    monkeypatch.setattr(refine, "refine_model", noted)
    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "out", "--layout", "latent", "--preset", "balanced", "--random-tokens", "1/2")
    data = str(tmp_path / "text.txt")
    calibration = CalibrationConfig(data=data, samples=8, sequence_length=32, random_tokens=0.5)
    text = Source.open(str(model)).calibration_text(calibration, 0)
    assert len(text.statistics) == 6
    assert len(text.fitted.statistics) == 12
    assert torch.equal(seen[0].windows, text.statistics)
    with torch.no_grad():
        source = AutoModelForCausalLM.from_pretrained(model)
        assert torch.allclose(source.lm_head(seen[0].hidden), source(text.statistics).logits, atol=1e-4)


def test_a_fused_model_keeps_tokens_that_its_text_lacks(tmp_path: Path) -> None:
    """The text is three words in turn; the model is then asked about the whole vocabulary."""
    model, windows = tiny_model(tmp_path / "model"), torch.randint(1, VOCABULARY, (8, 32))
    (tmp_path / "text.txt").write_text("the key reads " * 500)
    lost = dict[str, float]()
    for share in ("0", "1/3"):
        options = ("--overwrite", "--layout", "latent", "--samples", 40, "--random-tokens", share)
        fuse(model, tmp_path / "out", *options)
        with torch.no_grad():
            before, after = (headfuse.load(each)(windows).logits.log_softmax(-1) for each in (model, tmp_path / "out"))
        lost[share] = kl_div(after, before, reduction="batchmean", log_target=True).item()
    assert lost["1/3"] < lost["0"] / 2


@pytest.mark.parametrize("share", ["1", "-0.1", "a", "1/0", True])
def test_what_is_no_share(tmp_path: Path, share: object) -> None:
    with pytest.raises(ConfigError, match=r"random_tokens: .*(is out of range|is not a number|must be a number)"):
        headfuse.fuse(str(tmp_path), output=tmp_path / "out", random_tokens=share)
