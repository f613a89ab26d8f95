"""The average of the weights: what validations see and what is written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headfuse.training.averaging import averaged, keep_averages
from tests.training.runs import train

NAME, LAYER = "model.safetensors", "model.layers.0.self_attn.q_proj.weight"


def test_the_average_follows_the_weights() -> None:
    """Worked by hand from the weights after every step; inside `averaged` the weights are the averages."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    keep_averages(optimizer, decay=0.9)
    expected = None
    for step in range(1, 200):
        (weight - torch.randn(5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = weight.detach().clone()
        expected = now if expected is None else expected + max(0.1, 9 / (step + 9)) * (now - expected)
    assert expected is not None
    with averaged(optimizer):
        assert torch.allclose(weight, expected, atol=1e-6)
    assert torch.equal(weight, now)


def test_what_is_written_is_what_was_validated(fused: Path, data: str, tmp_path: Path) -> None:
    """Its NLL before a second run is the one after the first, in the last and in an earlier state."""
    for tokens, rate in ((20 * 32, 1e-3), (20 * 32, 0.3)):  # at the second rate an earlier state is the best
        output = tmp_path / str(rate)
        first = train(
            fused, data, tokens=tokens, learning_rate=rate, checkpoint_every=2, dtype="float32", output=output
        )
        again = train(output, data, tokens=32, learning_rate=1e-9, dtype="float32", output=tmp_path / f"again-{rate}")
        assert again.nll_before == pytest.approx(first.nll_after, abs=1e-5)


def test_without_an_average_the_weights_themselves_are_written(fused: Path, data: str, tmp_path: Path) -> None:
    options = {"tokens": 10 * 32, "dtype": "float32", "validation_windows": 1}
    runs = {
        decay: load_file(train(fused, data, ema_decay=decay, output=tmp_path / str(decay), **options).output / NAME)
        for decay in (0.0, 0.5, 0.99)
    }
    start = load_file(fused / NAME)
    moved = {
        decay: sum((after[name] - start[name].float()).square().sum() for name in start)
        for decay, after in runs.items()
    }
    assert moved[0.0] > moved[0.99] > 0
    assert not torch.equal(runs[0.5][LAYER], runs[0.0][LAYER])
