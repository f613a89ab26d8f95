"""Rewritten text: tokens are the source's own draws, at their places, and the targets are the source's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import headfuse
from headfuse import rewriting
from headfuse.architectures import ARCHITECTURES
from headfuse.rewriting import Targets, rewritten, targets
from headfuse.source import Source
from headfuse.streaming import StreamedModel

Opened = tuple[StreamedModel, Targets, torch.Tensor]


def opened(folder: Path, family: str) -> Opened:
    """A streamed source, a text, and the whole model's logits on it."""
    path = tiny_model(folder / "model", family)
    windows = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(3))
    source, model = Source.open(str(path)), headfuse.load(path)
    streamed = StreamedModel(source.checkpoint, source.config, torch.device("cpu"))
    with torch.no_grad():
        return streamed, targets(streamed, windows), model(windows).logits


@pytest.fixture
def source(tmp_path: Path) -> Opened:
    return opened(tmp_path, "llama")


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_targets_are_what_the_head_reads(tmp_path: Path, family: str) -> None:
    streamed, text, logits = opened(tmp_path, family)
    torch.testing.assert_close(streamed.logits(text.hidden), logits, rtol=1e-4, atol=1e-4)


def test_tokens_are_drawn_from_what_the_source_expects(source: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, text, logits = source
    monkeypatch.setattr(rewriting, "REWRITTEN", 1.0)
    draws = torch.stack([rewritten(streamed, text, seed) for seed in range(400)])
    assert torch.equal(draws[:, :, 0], text.windows[:, 0].expand(400, -1))
    chances = logits.softmax(-1)
    for place in (1, 17, 31):
        # the mean log-probability of draws from a distribution is minus its entropy
        expected = chances[0, place - 1]
        have = expected.log()[draws[:, 0, place]]
        entropy = -(expected * expected.log()).sum()
        spread = (expected * (expected.log() + entropy).square()).sum().sqrt() / 20
        assert abs(have.mean() + entropy) < 4 * spread


def test_a_share_is_drawn_and_the_seed_decides_which(source: Opened) -> None:
    streamed, text, _ = source
    first, again, other = (rewritten(streamed, text, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    share = (first != text.windows).float().mean()
    assert 0.15 < share < 0.45
