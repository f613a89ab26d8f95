"""Commands and Python of the README, the guides and the reference: run as they stand, in a folder with small stand-ins.

A block in ```bash or ```python is run. `<!-- not run: REASON -->` above it leaves it out. The options of its commands,
and of those in indented blocks, are still looked up.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from headfuse.cli.app import app

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "examples/mha-6m"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*/*.md")), *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"(<!-- not run: .*? -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
NOT_RUN = ("docs/reference/commands.md", "docs/contributing/", "docs/experiments")
"""Examples of help pages, code of recipes that tests/laws runs, and the diary."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the blocks of a page that are run."""
    if name_of(page).startswith(NOT_RUN):
        return []
    return [(kind, text) for left_out, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if not left_out]


def commands(page: Path) -> list[list[str]]:
    """The words of every headfuse command of a page, in blocks of any kind."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(
        r"^(?:\$ )?[^|`#]*?\bheadfuse ((?:analyze|fuse|uptrain|eval|export|report|doctor)\b.*)$", text, re.MULTILINE
    )
    in_block = [line for line in lines if f"    headfuse {line}" in text or f"\nheadfuse {line}" in text]
    return [shlex.split(re.sub(r"[\[\]]", "", line).split(" > ")[0], comments=True) for line in in_block]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model under the names that the pages use, texts, and the commands on the path."""
    folder = tmp_path_factory.mktemp("workspace")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = AutoConfig.from_pretrained(BUNDLED, num_key_value_heads=4, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUNDLED / name, folder / "model")
    shutil.copytree(folder / "model", folder / "examples/mha-6m")
    prose = (ROOT / "headfuse/data/prose.txt").read_text(encoding="utf-8").split("\f")
    for name, documents in (("corpus", prose[:-4]), ("test", prose[-4:])):
        lines = [json.dumps({"text": document}) for document in documents]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    programs = folder / "bin"
    programs.mkdir()
    for name, line in (("headfuse", f'exec {sys.executable} -m headfuse "$@"'), ("pip", ":")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    bash(folder, "headfuse fuse model/ --budget 1/2 --preset fast --data corpus.jsonl --samples 4 -o compressed")
    return folder


def bash(folder: Path, text: str, program: str = "bash -eo pipefail -c") -> None:
    """Run a block, and show what it said where it fails."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    command = [*shlex.split(program), text]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_blocks_run_as_they_stand(workspace: Path, tmp_path: Path, page: Path) -> None:
    folder = tmp_path / "here"
    shutil.copytree(workspace, folder)
    for kind, text in blocks(page):
        bash(folder, text, "bash -eo pipefail -c" if kind == "bash" else f"{shlex.quote(sys.executable)} -c")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_have_options_that_exist(page: Path) -> None:
    for words in commands(page):
        result = CliRunner().invoke(app, [*(word for word in words if word != "..."), "--help"])
        assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}"


def test_an_option_that_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Words.\n\n    headfuse fuse model/ --buget 1/4 \\\n        --preset fast  # half\n")
    (words,) = commands(page)
    assert words == ["fuse", "model/", "--buget", "1/4", "--preset", "fast"]
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 2
