#!/usr/bin/env python3
"""Coverage-guided fuzzing of the parsers: whatever bytes a file holds, it is read or refused with a HeadfuseError.

    pip install atheris
    python tests/robustness/fuzz_parsers.py plan -max_total_time=60     # a parser of PARSERS, then options of libFuzzer

A finding is written to crash-*; add the case to the tests when you mend it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["headfuse", "yaml"]):
    from headfuse.checkpoint.plan_file import read_plan
    from headfuse.checkpoint.reader import Checkpoint
    from headfuse.config.fuse import load_config
    from headfuse.config.uptrain import load_recipe
    from headfuse.config.values import parse_budget
    from headfuse.errors import HeadfuseError
    from headfuse.evaluation.gates import read_gates
    from headfuse.models.config import read_config
    from headfuse.models.heads import head_layout
    from headfuse.text.documents import read_documents

from tests.support.mutations import Place  # after the instrumented imports


def weights(place: Place, path: Path) -> None:
    """Open the checkpoint and read every tensor."""
    checkpoint = Checkpoint(path.parent)
    for name in checkpoint.shapes:
        checkpoint.read(name)


def budget(place: Place, path: Path) -> None:
    """The text of --budget; the command line turns its ValueError into a usage error."""
    with contextlib.suppress(ValueError):
        parse_budget(path.read_text(encoding="utf-8", errors="replace"))


PARSERS: dict[str, tuple[str, Callable[[Place, Path], object]]] = {
    "config": ("model/config.json", lambda p, f: head_layout(read_config(f.parent), f)),
    "weights": ("model/model.safetensors", weights),
    "index": ("shards/model.safetensors.index.json", weights),
    "options": ("fused/headfuse.yaml", lambda p, f: load_config(str(f), {})),
    "recipe": ("recipe.yaml", lambda p, f: load_recipe(str(f), {})),
    "plan": ("plan.json", lambda p, f: read_plan(f)),
    "gates": ("gates.yaml", lambda p, f: read_gates(str(f))),
    "records": ("lines.jsonl", lambda p, f: list(read_documents(str(f)))),
    "budget": ("text.txt", budget),
}


def main() -> None:
    """Entry point."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARSERS:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(PARSERS)}}} [option of libFuzzer ...]")
    name = sys.argv.pop(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as root:
        place = Place.make(Path(root) / "place")
        file, parse = PARSERS[name]
        path = place.root / file
        corpus = Path(root) / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(b"1/3" if name == "budget" else path.read_bytes())

        def one_input(data: bytes) -> None:
            path.write_bytes(data)
            try:
                parse(place, path)
            except HeadfuseError as error:
                if not (error.what and error.where and error.fix):
                    raise AssertionError("says not where, what and what to do") from error

        atheris.Setup([*sys.argv, str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
