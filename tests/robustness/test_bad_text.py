"""Bad text: one message that says where, what and what to do, exit code 1, and no output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.robustness.refusals import SMALL, refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such"),
        (b"", "no text"),
        (b"  \n ", "no text"),
        (b"the head", "are needed"),
        (b"\x00\xff\xfe\x01" * 100, "UTF-8"),
    ],
)
def test_bad_text(model: Path, tmp_path: Path, content: bytes | None, expected: str) -> None:
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    message = refused(tmp_path / "out", model, "--data", data, "--sequence-length", 32)
    assert "data.txt" in message
    assert expected in message


@pytest.mark.parametrize("content", ["{", "[]", '{"no": "text"}', '{"text": 3}', '"only a string"'])
def test_bad_jsonl(model: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content + "\n")
    assert "data.jsonl" in refused(tmp_path / "out", model, "--data", tmp_path / "data.jsonl", "--sequence-length", 32)


def test_bad_data_folders_and_kinds(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.docx").write_text("the head")
    (tmp_path / "text.parquet").write_bytes(b"PAR1 garbage PAR1")
    out, small = tmp_path / "out", ("--sequence-length", 32)
    assert "holds no" in refused(out, model, "--data", tmp_path / "empty", *small)
    assert "rename or convert" in refused(out, model, "--data", tmp_path / "text.docx", *small)
    assert "parquet" in refused(out, model, "--data", tmp_path / "text.parquet", *small)
    (tmp_path / "lines.jsonl").write_text("\n\n")
    assert "no text" in refused(out, model, "--data", tmp_path / "lines.jsonl", *small)


def test_several_texts_need_a_token_between_them(model: Path, tmp_path: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "two.jsonl").write_text('{"text": "the head"}\n' * 2)
    message = refused(tmp_path / "out", model, "--data", tmp_path / "two.jsonl", *SMALL)
    assert message.startswith("/model: the tokenizer has no EOS token")
