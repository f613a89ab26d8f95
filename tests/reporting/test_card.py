"""The model card: what its front matter keeps of the source's, in every form that the hub takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one tiny model, under a name that YAML would misread."""
    return tiny_model(tmp_path_factory.mktemp("sources") / "a: b")


def card_of(model: Path, out: Path, front: str | bytes | None) -> dict[str, Any]:
    """The metadata of the fused model of a source with this card."""
    card = model / "README.md"
    card.unlink(missing_ok=True)
    if front is not None:
        card.write_bytes(front if isinstance(front, bytes) else f"---\n{front}\n---\n\n# Source\n".encode())
    fuse(model, out, "--budget", 0.5, "--layout", "gqa")
    return metadata_load(out / "README.md") or {}


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license: mit", {"license": "mit"}),
        ("license:\n- mit\n- apache-2.0", {"license": ["mit", "apache-2.0"]}),
        (
            "license: other\nlicense_name: 'own: 1'\nlicense_link: LICENSE",
            {"license": "other", "license_name": "own: 1", "license_link": "LICENSE"},
        ),
        ("language: en\npipeline_tag: text-generation", {"language": ["en"], "pipeline_tag": "text-generation"}),
        ("language:\n- no\n- en", {"language": ["no", "en"]}),
        ("tags: chat", {"tags": ["chat", "headfuse", "kv-cache"]}),
        ("tags: [chat, 'on', headfuse]", {"tags": ["chat", "on", "headfuse", "kv-cache"]}),
        ("extra_gated_prompt: >-\n  Agree\n  first", {"extra_gated_prompt": "Agree first"}),
        ("model-index:\n- name: x\n  results: []\nwidget: []\nlicense: mit\nmetrics: [a]", {"license": "mit"}),
        ("", {}),
    ],
)
def test_metadata_of_the_source(sources: Path, tmp_path: Path, front: str, kept: dict[str, Any]) -> None:
    assert card_of(sources, tmp_path / "out", front) == {"tags": ["headfuse", "kv-cache"], **kept}


@pytest.mark.parametrize(
    "front",
    [
        "license: [mit", "- a\n- list", "a: b: c", "license: mit\nlicense: !!python/object:os.x {}", "1: 2\n? [a]\n: b",
        b"---\nlicense: m\xfft\n---\n", None, b"---", b"",
    ],
    ids=str,
)  # fmt: skip
def test_front_matter_that_cannot_be_read(sources: Path, tmp_path: Path, front: str | bytes | None) -> None:
    out = tmp_path / "out"
    assert card_of(sources, out, front)["tags"] == ["headfuse", "kv-cache"]
    (out / "README.md").write_bytes(front if isinstance(front, bytes) else f"---\n{front}\n---\n\n# Own\n".encode())
    exported, trained = tmp_path / "exported", tmp_path / "trained"
    run("export", out, "--to", "layerwise", "-o", exported)
    run("uptrain", out, "--data", sources.parent / "text.txt", "--tokens", 32, "--sequence-length", 16, "--batch-size",
        1, "--loss", "ce", "-o", trained)  # fmt: skip
    for folder, title in ((exported, "## Exported"), (trained, "## Uptraining")):
        text = (folder / "README.md").read_text()
        assert (metadata_load(folder / "README.md") or {})["tags"] == ["headfuse", "kv-cache"]
        assert title in text
        assert isinstance(front, bytes) or "# Own" in text


def test_a_licence_in_the_card_itself_goes_along(sources: Path, tmp_path: Path) -> None:
    out, exported = tmp_path / "out", tmp_path / "exported"
    link = card_of(sources, out, "license: other\nlicense_name: own\nlicense_link: README.md")["license_link"]
    run("export", out, "--to", "layerwise", "-o", exported)
    for folder in (out, exported):
        assert (folder / link).read_bytes() == (sources / "README.md").read_bytes()
        assert link in (folder / "plan.json").read_text()


def test_a_section_leaves_the_card_before_it_as_it_was(sources: Path, tmp_path: Path) -> None:
    out, exported = tmp_path / "out", tmp_path / "exported"
    assert card_of(sources, out, "license: mit")["license"] == "mit"
    run("export", out, "--to", "layerwise", "-o", exported)
    assert (exported / "README.md").read_text().startswith((out / "README.md").read_text().rstrip())
