"""Docstrings, comments and documents cite documents that exist, and sections of the mathematics that it has."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MATHEMATICS = ROOT / "docs/how-it-works/mathematics.md"
SAMPLES = [Path(__file__).with_name(f"test_{name}.py") for name in ("citations", "commands", "links", "site")]
"""Tests with documents that are not there."""
FILES = [
    path
    for place in ("headfuse", "tests", "docs", "benchmarks")
    for path in sorted((ROOT / place).rglob("*"))
    if path.suffix in (".py", ".md", ".yaml") and path not in (*SAMPLES, MATHEMATICS)
    if "companions" not in path.name  # they list the documents of other models
]
DOCUMENTS = {path.name for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))}
WRITTEN = {"README.md", "README-source.md", "summary.md"}
"""Files that runs and tests write."""

CITATION = re.compile(r"mathematics\.md(?:#section-([\d-]+)|\s+sections?\s+(\d[\d.]*(?:(?:, | and )\d[\d.]*)*))?")
DOCUMENT = re.compile(r"(?<![\w{}*<>./-])[\w./-]*[\w-]\.md\b")


def sections() -> set[str]:
    """The numbers of the headings."""
    text = MATHEMATICS.read_text(encoding="utf-8")
    return set(re.findall(r"^##+ (\d+(?:\.\d+)?)\.? ", text, re.MULTILINE))


def wrong_sections(text: str) -> list[str]:
    """The sections that a text cites and the mathematics has not; `none` where prose names the document alone."""
    cited: list[str] = []
    for anchor, numbers in CITATION.findall(re.sub(r"\]\([^)#\s]*mathematics\.md\)", "]", text)):
        cited += [anchor.replace("-", ".")] if anchor else re.findall(r"\d+(?:\.\d+)*", numbers) or ["none"]
    return [section for section in cited if section not in sections()]


def missing_documents(text: str, folder: Path) -> list[str]:
    """The documents that a text names and that are not there, by path from the root or its own folder, or by name."""
    return [
        name
        for name in DOCUMENT.findall(text)
        if Path(name).name not in WRITTEN
        and not (name in DOCUMENTS if "/" not in name else any((start / name).exists() for start in (ROOT, folder)))
    ]


def test_citations_of_the_mathematics_name_sections_that_it_has() -> None:
    wrong = {str(path.relative_to(ROOT)): wrong_sections(path.read_text(encoding="utf-8")) for path in FILES}
    assert {path: sections for path, sections in wrong.items() if sections} == {}


def test_cited_documents_exist() -> None:
    files = [*FILES, *ROOT.glob("*.md")]
    missing = {
        str(path.relative_to(ROOT)): missing_documents(path.read_text(encoding="utf-8"), path.parent) for path in files
    }
    assert {path: names for path, names in missing.items() if names} == {}


def test_wrong_citations_are_found() -> None:
    assert wrong_sections("mathematics.md section 4.1, mathematics.md section 99.1") == ["99.1"]
    assert wrong_sections("(mathematics.md sections 4.1, 98 and 99.1)") == ["98", "99.1"]
    assert wrong_sections("(mathematics.md#section-4-9)") == ["4.9"]
    assert wrong_sections("see docs/how-it-works/mathematics.md") == ["none"]
    assert wrong_sections("[the mathematics](how-it-works/mathematics.md)") == []
    assert missing_documents("(math.md 4, docs/reference/gates.md, dha.md, docs/absent.md)", ROOT) == [
        "math.md",
        "docs/absent.md",
    ]


def test_the_links_of_the_mathematics_lead_somewhere() -> None:
    text = MATHEMATICS.read_text(encoding="utf-8")
    anchors = dict(re.findall(r'<a id="section-([\d-]+)"></a>\n##+ (\d+(?:\.\d+)?)', text))
    assert set(anchors.values()) == sections()
    assert [anchor for anchor, number in anchors.items() if anchor.replace("-", ".") != number] == []
    assert [anchor for anchor in re.findall(r"\(#section-([\d-]+)\)", text) if anchor not in anchors] == []
    assert [number for number in re.findall(r"\bsection (\d[\d.]*\d|\d+)", text) if number not in sections()] == []
    assert missing_documents(text, MATHEMATICS.parent) == []


def test_the_mathematics_names_functions_that_exist() -> None:
    text = MATHEMATICS.read_text(encoding="utf-8")
    package = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "headfuse").rglob("*.py"))
    names = re.findall(r"`(\w+)\(\)`", text) + re.findall(r"`([A-Z][A-Za-z_]{4,})`", text)
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"^(def|class) {name}\b|^{name}\b", package, re.MULTILINE)] == []
