"""Random damage to everything that headfuse reads: a message that helps, or success; never anything else.

`-m slow` runs thousands of them; tests/robustness/fuzz_parsers.py goes on with a coverage-guided fuzzer.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from headfuse.conversion import long_runs
from headfuse.models import speed
from tests.support.mutations import TARGETS, Place, check, check_line, command_line, mutated

MANY = 20
"""Times as many under the slow marker."""


def examples(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip


SEEDS = st.integers(0, 2**32 - 1)
TIMES = [pytest.param(1, id="some"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths lead nowhere that matters, no hub is asked, and no time goes into measuring the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in (speed, long_runs):
        monkeypatch.setattr(module, "measured_speed", lambda device, dtype: 1e10)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(place: Place, name: str, times: int) -> None:
    content = (place.root / TARGETS[name].file).read_bytes()
    assert check(place, name, content) == 0

    @examples(18 * times)
    @given(SEEDS)
    def damaged(seed: int) -> None:
        check(place, name, mutated(name, content, random.Random(seed)))

    damaged()


@pytest.mark.parametrize("times", TIMES)
def test_command_lines(place: Place, times: int) -> None:
    @examples(100 * times)
    @given(SEEDS)
    def line(seed: int) -> None:
        check_line(place, command_line(place, random.Random(seed)), codes=(0, 1, 2, 3))

    line()
