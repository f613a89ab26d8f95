"""Texts of several domains: `python benchmarks/domain_texts.py OUT --tasks TASKS --prose TRAIN.jsonl`.

Writes `code_train.jsonl` and `code_test.jsonl` (this Python's standard library, every second file), `chat_train.jsonl`
and `chat_test.jsonl` (questions and answers of GSM8K as chats, from the folder of scripts/get_tasks.py), and
`mixed_train.jsonl`: 200 documents each of the prose, the code and the chats, in turn; `prose_code_train.jsonl`: of the
prose and the code. What each costs as calibration text is then measured by benchmarks/quality.py
(docs/experiments/calibration-domains.md).
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

SHORTEST, LONGEST = 4000, 60000
"""Characters of a file of code."""
OF_EACH = 200
"""Documents of each domain in the mixed text."""


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", type=Path, required=True, help="folder that scripts/get_tasks.py wrote")
    parser.add_argument("--prose", type=Path, required=True, help="documents, jsonl")
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
