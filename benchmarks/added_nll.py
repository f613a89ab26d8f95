"""What conversions add to the NLL of several texts: `python benchmarks/added_nll.py SOURCE FUSED ... --text NAME=FILE`.

A table of Markdown: for every text the source's NLL per token, then what each fused folder adds to it, in nats, with
the standard error over windows. A file whose documents name a `source` (such as `languages_test.jsonl` of
benchmarks/domain_texts.py) gives one column for each of them. What was measured is kept in `--results`, and is not
measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import headfuse
from headfuse.estimates import mean
from headfuse.evaluation.perplexity import nll_per_window
from headfuse.models.loading import load_tokenizer
from headfuse.text.documents import read_documents
from headfuse.text.records import Document
from headfuse.text.windows import token_windows

LENGTH = 512


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="+", help="the source, then fused folders")
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=16, help=f"of {LENGTH} tokens, of every text")
    parser.add_argument("--by-source", type=Path, help="documents with a source: a column for each")
    parser.add_argument("--windows-by-source", type=int, default=6, help=f"of {LENGTH} tokens, of every source")
    parser.add_argument("--dtype", help="of the evaluation, as of headfuse eval")
    parser.add_argument("--results", type=Path, help="keep what was measured in this file, JSON")
    options = parser.parse_args()
    kept = options.results is not None and options.results.exists()
    known: dict[str, dict[str, list[float]]] = json.loads(options.results.read_text()) if kept else {}
    missing = [folder for folder in options.model if folder not in known]
    texts = windows(options) if missing else {}
    for folder in missing:
        known[folder] = losses(folder, texts, options.dtype)
        if options.results is not None:
            options.results.write_text(json.dumps(known))
    print(table(known, options.model))


def windows(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The windows of every text `[k, LENGTH]`, as the source's tokenizer makes them."""
    tokenizer = load_tokenizer(options.model[0])
    texts = dict(text.split("=", 1) for text in options.text)
    found = {
        name: token_windows(read_documents(file, tokenizer=tokenizer), tokenizer, LENGTH, options.windows)
        for name, file in texts.items()
    }
    if options.by_source is not None:
        documents = [each for each in read_documents(str(options.by_source)) if isinstance(each, Document)]
        for name in dict.fromkeys(document.source for document in documents):
            own = [document for document in documents if document.source == name]
            found[str(name)] = token_windows(own, tokenizer, LENGTH, options.windows_by_source)
    return found


def losses(folder: str, texts: dict[str, torch.Tensor], dtype: str | None) -> dict[str, list[float]]:
    """NLL per token of every window of every text."""
    model = headfuse.load(folder, dtype=dtype)
    return {name: nll_per_window(model, each).tolist() for name, each in texts.items()}


def table(known: dict[str, dict[str, list[float]]], folders: list[str]) -> str:
    """The source's NLL, and what the others add to it."""
    source, names = known[folders[0]], list(known[folders[0]])
    own = " | ".join(f"{mean(source[name]).value:.3f}" for name in names)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", f"| {Path(folders[0]).name} | {own} |"]
    for folder in folders[1:]:
        added = [
            mean([mine - its for mine, its in zip(known[folder][name], source[name], strict=True)]) for name in names
        ]
        cells = " | ".join(f"{each.value:.3f} ± {each.stderr or 0:.3f}" for each in added)
        lines.append(f"| {Path(folder).name} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
