"""A tokenizer with more tokens than embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tests.support.commands import run
from tests.support.model_outputs import TOKENS, in_transformers
from tests.support.tiny_models import VOCABULARY


def more_tokens(model: Path, *words: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    room = VOCABULARY - len(tokenizer)
    tokenizer.add_tokens([AddedToken(f"<{i}>", special=True) for i in range(room)] + [AddedToken(w) for w in words])
    tokenizer.save_pretrained(model)


def test_a_larger_tokenizer_is_a_warning(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gguf")
    more_tokens(model, "[PAD]")
    data = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    for command in (
        ("fuse", model, "-o", tmp_path / "out", "--budget", 0.5, "--layout", "gqa", *data, "--samples", 4),
        ("fuse", model, "--dry-run", *data),
        ("analyze", model, *data, "--samples", 4),
        ("eval", model, *data, "--samples", 2),
        ("uptrain", model, "--loss", "ce", "--tokens", 64, "--batch-size", 1, *data, "-o", tmp_path / "up"),
        ("export", tmp_path / "out", "--to", "gguf", "-o", tmp_path / "out.gguf"),
    ):
        caplog.clear()
        run(*command)
        said = [record.getMessage() for record in caplog.records if "'[PAD]'" in record.getMessage()]
        assert len(said) == 1, command


def test_the_tokens_of_a_gguf_file_are_cut_to_the_embeddings(model: Path, tmp_path: Path) -> None:
    from tests.support.llama_cpp import LlamaCpp

    more_tokens(model, "[PAD]")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(model)
    run("export", model, "--to", "gguf", "--type", "f32", "-o", tmp_path / "out.gguf")
    expected = in_transformers(model)[0, -1].log_softmax(-1)
    found = LlamaCpp(tmp_path / "out.gguf").log_probabilities(TOKENS[0].tolist(), VOCABULARY)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_text_with_a_token_that_is_not_embedded_names_it(model: Path, tmp_path: Path) -> None:
    more_tokens(model, "reads")
    data = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    for command in (
        ("fuse", model, "-o", tmp_path / "out", *data),
        ("fuse", model, "--dry-run", *data),
        ("analyze", model, *data),
        ("eval", model, *data),
        ("uptrain", model, "--loss", "ce", "--tokens", 64, *data, "-o", tmp_path / "out"),
    ):
        assert f"the token 'reads' (id {VOCABULARY})" in run(*command, code=1), command
    assert not (tmp_path / "out").exists()
