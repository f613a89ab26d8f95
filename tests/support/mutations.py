"""Damaged inputs: every file that headfuse reads, changed at random, and what must come of it.

Used by test_mutations.py (hypothesis chooses the changes) and robustness/fuzz_parsers.py (atheris chooses the bytes).
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import string
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer.main
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from headfuse.cli.app import app
from headfuse.conversion.resume import FinishedLayers
from tests.support.commands import run
from tests.support.mutated_content import SECRET, dumped, mutated_bytes, mutated_json
from tests.support.tiny_models import tiny_model

PATIENCE = 60
"""Seconds of processor time after which a command hangs."""
SIZE = ("--samples", 2, "--sequence-length", 8, "--threads", 1)


@dataclass(frozen=True)
class Place:
    """A folder with a tiny model (`model/`), the same in shards, a fused one, their text, and what lies outside."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Place:
        place = cls(root)
        tiny_model(place.model, layers=1, kv_heads=2, query_heads=2)
        (place.model / "evil.py").write_text(f"open({str(place.marker)!r}, 'w')\nclass Evil: ...\n")
        shutil.copytree(place.model, place.shards)
        AutoModelForCausalLM.from_pretrained(place.model).save_pretrained(place.shards, max_shard_size="20KB")
        (place.shards / "model.safetensors").unlink()
        (root / SECRET).mkdir()
        shutil.copyfile(place.model / "model.safetensors", root / SECRET / "model.safetensors")
        (root / "lines.jsonl").write_text('{"text": "the head of a key"}\n' * 40)
        run(*place.fuse(place.model), "-o", place.fused)
        shutil.copyfile(place.fused / "plan.json", root / "plan.json")
        run(*place.fuse(place.model), "--layout", "layerwise", "-o", place.layerwise)
        place.interrupt()
        (root / "gates.yaml").write_text('gates:\n- "nll<=99"\n- "parameters>=1"\n- "perplexity<=1e9"\n')
        (root / "recipe.yaml").write_text("loss: kl\nlearning_rate: 1e-4\nbatch_size: 2\nsequence_length: 8\n")
        return place

    model = property(lambda self: self.root / "model")
    shards = property(lambda self: self.root / "shards")
    fused = property(lambda self: self.root / "fused")
    layerwise = property(lambda self: self.root / "layerwise")
    remains = property(lambda self: self.root / "remains")
    out = property(lambda self: self.root / "out")
    partial = property(lambda self: self.root / "out.partial")
    marker = property(lambda self: self.root / "code-was-run")

    def fuse(self, model: Path, *more: object) -> tuple[object, ...]:
        return ("fuse", model, "--data", self.root / "text.txt", "--budget", 1 / 2, "--preset", "fast", *SIZE, *more)

    def interrupt(self) -> None:
        """Leave in `remains/` what a conversion to `out` has done when Ctrl-C comes after its layer."""
        add = FinishedLayers.add

        def interrupted(self: FinishedLayers, layer_idx: int) -> None:
            add(self, layer_idx)
            raise KeyboardInterrupt

        FinishedLayers.add = interrupted  # type: ignore[method-assign]
        try:
            run(*self.fuse(self.model), "-o", self.out, code=130)
        finally:
            FinishedLayers.add = add  # type: ignore[method-assign]
        self.partial.rename(self.remains)


@dataclass(frozen=True)
class Target:
    """A file that may be damaged, relative to the place, and the commands that read it."""

    file: str
    lines: Callable[[Place], list[tuple[object, ...]]]
    binary: bool = False


TARGETS = {
    "config": Target("model/config.json", lambda p: [p.fuse(p.model, "--dry-run"), p.fuse(p.model)]),
    "weights": Target("model/model.safetensors", lambda p: [p.fuse(p.model)], binary=True),
    "index": Target("shards/model.safetensors.index.json", lambda p: [p.fuse(p.shards)]),
    "tokenizer": Target("model/tokenizer.json", lambda p: [p.fuse(p.model)]),
    "tokenizer config": Target("model/tokenizer_config.json", lambda p: [p.fuse(p.model)]),
    "options": Target(
        "fused/headfuse.yaml",
        lambda p: [("fuse", p.model, "-c", p.fused / "headfuse.yaml", "--data", p.root / "text.txt", "--dry-run")],
    ),
    "plan": Target("plan.json", lambda p: [p.fuse(p.model, "--plan", p.root / "plan.json")]),
    "fused config": Target("fused/config.json", lambda p: [evaluation(p, p.fused)]),
    "checksums": Target("fused/plan.json", lambda p: [evaluation(p, p.fused, "--verify")]),
    "generation": Target("model/generation_config.json", lambda p: [p.fuse(p.model, "--dry-run")]),
    "refreshed plan": Target("layerwise/plan.json", lambda p: [("export", p.layerwise, "--refresh")]),
    "export": Target("layerwise/config.json", lambda p: [export(p, "gqa"), export(p, "gguf")]),
    "export weights": Target("layerwise/model.safetensors", lambda p: [export(p, "gqa")], binary=True),
    "export plan": Target("layerwise/plan.json", lambda p: [export(p, "gqa")]),
    "resume": Target("remains/resume.json", lambda p: [p.fuse(p.model, "--resume")]),
    "resume layers": Target("remains/state/done.json", lambda p: [p.fuse(p.model, "--resume")]),
    "resume plan": Target("remains/state/plan.json", lambda p: [p.fuse(p.model, "--resume")]),
    "gates": Target("gates.yaml", lambda p: [evaluation(p, p.fused, "--gate", p.root / "gates.yaml")]),
    "recipe": Target("recipe.yaml", lambda p: [training(p, "--config", p.root / "recipe.yaml")]),
    "records": Target("lines.jsonl", lambda p: [evaluation(p, p.fused, "--data", p.root / "lines.jsonl")]),
}


def evaluation(place: Place, model: Path, *more: object) -> tuple[object, ...]:
    data = () if "--data" in more else ("--data", place.root / "text.txt")
    return ("eval", model, *data, *SIZE, *more)


def export(place: Place, to: str) -> tuple[object, ...]:
    return ("export", place.layerwise, "--to", to, "-o", place.out)


def training(place: Place, *more: object) -> tuple[object, ...]:
    data = ("--data", place.root / "text.txt")
    return ("uptrain", place.model, *data, "--tokens", 16, "--threads", 1, "-o", place.out, "--loss", "ce", *more)


# ---------------------------------------------------------------- what must come of it


def check(place: Place, name: str, content: bytes) -> int:
    """Give a target this content and run the commands that read it; the exit code of the last one."""
    target = TARGETS[name]
    path = place.root / target.file
    original = path.read_bytes()
    path.write_bytes(content)
    code = 0
    try:
        for line in target.lines(place):
            if "--resume" in line:
                shutil.copytree(place.remains, place.partial)
            code = check_line(place, line)
            if code:
                break
    finally:
        path.write_bytes(original)
    return code


def check_line(place: Place, line: tuple[object, ...], codes: tuple[int, ...] = (0, 1, 3)) -> int:
    """Run a command: it succeeds, or says where, what and what to do, leaves no output, and looks nowhere else."""
    arguments = [str(part) for part in line]
    if arguments[0] == "fuse" and "-o" not in arguments:
        arguments += ["-o", str(place.out)]
    with _patience(), _watched() as opened:
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code in codes, (arguments, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert "Traceback" not in result.output, result.output
    if result.exit_code == 1:
        assert "a fault of headfuse" not in result.stderr, (arguments, result.stderr)
        first, _, fix = result.stderr.partition("\n  ")
        assert "error: " in first, result.stderr
        assert fix.strip(), (arguments, result.stderr)
        assert not place.out.exists(), arguments
        assert "--resume" in line or not place.partial.exists(), arguments
    for left in (place.out, place.partial):
        shutil.rmtree(left, ignore_errors=True)
        left.unlink(missing_ok=True)
    assert not place.marker.exists(), "code of the model was run"
    assert not opened, opened
    return result.exit_code


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    def hangs(number: int, frame: object) -> None:
        raise AssertionError(f"hangs: still at work after {PATIENCE} s of processor time")

    previous = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


_opened: list[str] | None = None
"""What was opened outside; None while nobody watches: an audit hook stays for ever."""
_hooked = False


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir") and SECRET in str(args[:1]):
        _opened.append(str(args[0]))


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    global _opened, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _opened = found = list[str]()
    try:
        yield found
    finally:
        _opened = None


# ---------------------------------------------------------------- changes


def mutated(name: str, content: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a target's content: as bytes, or as the JSON or YAML that it holds."""
    if rng.random() < 0.3:
        return mutated_bytes(content, rng)
    if TARGETS[name].binary:
        (length,) = struct.unpack("<Q", content[:8])
        header, rest = mutated_json(json.loads(content[8 : 8 + length]), rng), content[8 + length :]
        text = dumped(header)
        claimed = len(text) if rng.random() < 0.9 else rng.choice([0, 1, length, 2**32, 2**63])
        return struct.pack("<Q", claimed) + text + rest
    if TARGETS[name].file.endswith((".yaml", ".jsonl")):
        import yaml

        document = yaml.safe_load(content) if TARGETS[name].file.endswith(".yaml") else {"text": "the head of a key"}
        text = dumped(mutated_json(document, rng))  # JSON is YAML
        return text if name != "records" else b"\n".join([*content.splitlines()[: rng.randrange(9)], text, b""])
    return dumped(mutated_json(json.loads(content), rng))


OPTIONS = [
    "--budget", "-b", "--method", "--allocator", "--grouping", "--layout", "--for", "--preset", "--data", "--samples",
    "--sequence-length", "--output", "-o", "--config", "-c", "--overwrite", "--resume", "--seed", "--device", "--dtype",
    "--threads", "--json", "-q", "-v", "--trust-remote-code", "--plan", "--dry-run", "--tokens", "--teacher", "--loss",
    "--learning-rate", "--batch-size", "--gradient-accumulation", "--log-every", "--checkpoint-every", "--baseline",
    "--gate", "--verify", "--help", "--version", "--nosuch", "--", "-",
]  # fmt: skip


def command_line(place: Place, rng: random.Random) -> tuple[object, ...]:
    """A command with options of this and other commands, and values that suit them or not."""
    values: list[object] = [
        "0.5", "1/3", "1e-9", "-1", "0", "1", "7", "99999999999", "nan", "inf", "", " ", "x" * 3000, "é\u2028",
        "--", "\udc80",
        "subspace", "mean", "align", "first", "gqa", "decoupled", "layerwise", "fast", "vllm", "cpu", "bfloat16",
        "uniform",
        "headfuse-25", "ci-gate", "nll<=1", "nll<=", "default", place.model, place.fused, place.shards, place.root,
        place.root / "plan.json", place.root / "text.txt", place.root / "nosuch", f"{place.out}", "no/such", "../..",
        "/dev/null",
        place.model / "config.json", place.root / "text.txt" / "x", "1K", "".join(rng.choices(string.printable, k=5)),
    ]  # fmt: skip
    command = rng.choice(["fuse", "fuse", "analyze", "eval", "uptrain", "export", "nosuch", ""])
    line: list[object] = [command, rng.choice([place.model, place.model, place.fused, rng.choice(values)])]
    if rng.random() < 0.8:
        line += ["--samples", 2, "--sequence-length", 8, "--data", place.root / "text.txt"]
    declared = typer.main.get_command(app).commands.get(str(command))  # type: ignore[attr-defined]
    own = [option for parameter in declared.params for option in parameter.opts] if declared else OPTIONS
    for _ in range(rng.randrange(5)):
        line.append(rng.choice(own if rng.random() < 0.8 else OPTIONS))
        if rng.random() < 0.7:
            line.append(rng.choice(values))
    if command != "eval":
        line += ["-o", place.out]
    return tuple(line)
