"""With `pytest -p tests.support.pretended_cuda.plugin`, `--device auto` is the pretended device in every test."""

from __future__ import annotations

from typing import Any

from tests.support.pretended_cuda import UnavailableError, start


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--no-float64", action="store_true", help="the device refuses float64, as MPS does")


def pytest_configure(config: Any) -> None:
    """Before anything asks for a GPU; models that tests load to feed them themselves stay on the CPU."""
    import pytest

    try:
        start(float64=not config.getoption("--no-float64"))
    except UnavailableError as reason:
        pytest.exit(f"skipped, without a pretended CUDA device: {reason}", returncode=0)
    from headfuse.models.loading import load_model

    assert load_model.__kwdefaults__ is not None
    load_model.__kwdefaults__["device"] = "cpu"
