"""Texts of several domains: `python benchmarks/domain_texts.py OUT --tasks TASKS --prose TRAIN.jsonl`.

Writes `code_train.jsonl` and `code_test.jsonl` (this Python's standard library, every second file), `chat_train.jsonl`
and `chat_test.jsonl` (questions and answers of GSM8K as chats, from the folder of scripts/get_tasks.py), and
`mixed_train.jsonl`: 200 documents each of the prose, the code and the chats, in turn; `prose_code_train.jsonl`: of the
prose and the code. With `--handbook FOLDER` (usr/share/doc/debian-handbook/html of Debian's package of that name, one
book in many languages) also `languages_test.jsonl` (every second page in English and in LANGUAGES, in turn),
`long_test.txt` (those in English, joined) and `prose_code_languages_train.jsonl` (the prose, the code and the other
pages in LANGUAGES, in turn). What each costs as calibration text is then measured by benchmarks/quality.py and
`headfuse eval --baseline` (docs/experiments/calibration-domains.md).
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sysconfig
from collections.abc import Iterable
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

SHORTEST, LONGEST = 4000, 60000
"""Characters of a file of code."""
OF_EACH = 200
"""Documents of each domain in the mixed text."""
LANGUAGES = ("fr-FR", "de-DE", "es-ES", "ru-RU", "ja-JP", "zh-CN")
PARAGRAPH = re.compile(r'<div class="para">(.*?)</div>', re.DOTALL)
SHORTEST_PAGE = 1500
"""Characters of a page of the handbook."""


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", type=Path, required=True, help="folder that scripts/get_tasks.py wrote")
    parser.add_argument("--prose", type=Path, required=True, help="documents, jsonl")
    parser.add_argument("--handbook", type=Path, help="folder of HTML pages by language")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    code, chats = library(), questions(options.tasks / "gsm8k_gold.jsonl")
    for name, records in (("code", [{"text": text} for text in code]), ("chat", [chat(*each) for each in chats])):
        write(options.output / f"{name}_train.jsonl", records[::2])
        write(options.output / f"{name}_test.jsonl", records[1::2])
    with options.prose.open(encoding="utf-8") as lines:
        prose = [json.loads(line)["text"] for line in islice(lines, OF_EACH)]
    asked = [f"Question: {question}\nAnswer: {answer}" for question, answer in chats[::2]]
    plain = ["\n\n".join(asked[first : first + 3]) for first in range(0, len(asked), 3)]
    mixed = chain.from_iterable(zip(prose, code[::2], plain, strict=False))
    write(options.output / "mixed_train.jsonl", [{"text": text} for text in mixed])
    both = chain.from_iterable(zip(prose, code[::2], strict=False))
    write(options.output / "prose_code_train.jsonl", [{"text": text} for text in both])
    if options.handbook is not None:
        write_languages(options.handbook, options.output, prose, code[::2])


def write_languages(root: Path, output: Path, prose: list[str], code: list[str]) -> None:
    """The files of the handbook."""
    books = {language: handbook(root, language) for language in ("en-US", *LANGUAGES)}
    tests = zip(*([(language, page) for page in book[1::2]] for language, book in books.items()), strict=False)
    records = [{"text": page, "source": language} for language, page in chain.from_iterable(tests)]
    write(output / "languages_test.jsonl", records)
    (output / "long_test.txt").write_text("\n\n".join(books["en-US"][1::2]), encoding="utf-8")
    pages = chain.from_iterable(zip(*(books[language][::2] for language in LANGUAGES), strict=False))
    every = chain.from_iterable(zip(prose, code, pages, strict=False))
    write(output / "prose_code_languages_train.jsonl", [{"text": text} for text in every])


def library() -> list[str]:
    """The modules of the standard library, without its tests."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), list[str]()
    for path in sorted(root.rglob("*.py")):
        if any(word in str(path.relative_to(root)) for word in ("site-packages", "test")):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if SHORTEST < len(text) < LONGEST:
            found.append(text)
    return found


def handbook(root: Path, language: str) -> list[str]:
    """The pages of a book in a language; of a translation without what is still English."""
    found = list[str]()
    for path in sorted((root / language).glob("*.html")):
        english = set(paragraphs(root / "en-US" / path.name)) if language != "en-US" else set[str]()
        text = "\n\n".join(each for each in paragraphs(path) if each not in english)
        if len(text) >= SHORTEST_PAGE:
            found.append(text)
    return found


@cache
def paragraphs(path: Path) -> list[str]:
    """The text of a page's paragraphs; those in English are asked for by every translation."""
    found = PARAGRAPH.findall(path.read_text(encoding="utf-8")) if path.exists() else []
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", "", each)).split()) for each in found]


def questions(path: Path) -> list[tuple[str, str]]:
    """Questions and their answers; of a prompt with examples the last question."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = (row["context"].rpartition("Question: ")[2].partition("\nAnswer:")[0] for row in rows)
    return [(question, row["answer"].strip()) for question, row in zip(asked, rows, strict=True)]


def chat(question: str, answer: str) -> dict[str, Any]:
    """One record of a chat."""
    turns = {"user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON document a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
