"""Steps, batch sizes and learning rates."""

import math

import pytest

from headfuse.config.uptrain import UptrainConfig
from headfuse.training.schedule import (
    default_batch_size,
    default_checkpoint_every,
    default_learning_rate,
    learning_rate_at,
    num_steps,
)


def test_schedule_warms_up_and_falls_along_a_cosine_to_a_tenth() -> None:
    recipe = UptrainConfig.model_validate({"data": "a", "tokens": 1})
    rates = [learning_rate_at(step, 100, recipe) for step in range(100)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3 + 48] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate_at(0, 1, recipe) == 1.0


def test_steps_come_nearest_to_the_tokens() -> None:
    assert [num_steps(tokens, 4096) for tokens in (1, 82_000, 246_000, 6143, 6145)] == [1, 20, 60, 1, 2]


def test_validations_are_ten_or_a_tenth_of_the_time() -> None:
    assert default_checkpoint_every(500, 8, 16) == 50
    assert default_checkpoint_every(500, 1, 16) == 50
    assert default_checkpoint_every(59, 1, 16) == 40
    assert default_checkpoint_every(12, 1, 16) == 12
    assert default_checkpoint_every(12, 8, 0) == 10


def test_default_learning_rate_goes_by_size() -> None:
    assert [default_learning_rate(size) for size in (6e6, 135e6, 7e9)] == [2e-4, 1e-4, 2e-5]


def test_default_batch_is_small_where_tokens_are_few() -> None:
    assert [default_batch_size(tokens, 512) for tokens in (1, 82_000, 1_100_000, 50_000_000)] == [1, 1, 4, 8]
