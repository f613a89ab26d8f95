"""A tiny model with tied embeddings, for every test to change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.model_edits import HEAD, edit_json, edit_tensors
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose config ties the embeddings, as its weights are."""
    model = tiny_model(tmp_path_factory.mktemp("pristine") / "model")
    edit_json(model / "config.json", tie_word_embeddings=True)
    edit_tensors(model, lambda tensors: tensors.pop(HEAD))
    return model


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    shutil.copy(pristine.parent / "text.txt", tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "model"))
