"""Which files of a model folder go with the model: names of well-known repositories, and folders that were fused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from headfuse.checkpoint.companions import is_companion, is_read
from tests.support.commands import fuse, run
from tests.support.listed_companions import entries
from tests.support.model_outputs import logits
from tests.support.tiny_models import tiny_model


def test_names_of_well_known_repositories() -> None:
    """Marks: `kept` goes into outputs, `read` is downloaded as well; of the rest, an index decides on weights alone."""
    marks = {mark: {(r, n) for r, m, n in entries() if m == mark} for mark in ("kept", "read", "left")}
    everything = set.union(*marks.values())
    assert len({repository for repository, _ in everything}) > 20
    assert {entry for entry in everything if is_companion(entry[1])} == marks["kept"]
    assert {entry for entry in everything if is_read(entry[1])} == marks["kept"] | marks["read"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def edit(path: Path, **changes: object) -> None:
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


KEPT = (
    "LICENSE",
    "additional_chat_templates/tools.jinja",
    "assets/logo.png",
    "USE_POLICY.md",
    "merges.txt",
    "a.tiktoken",
)
LEFT = ("model.fp16.safetensors", "onnx/model.onnx", "original/params.json", "params.json", "optimizer.pt",
        "weights.zip", "checkpoint-5/tokenizer.json", "openvino/m.xml", "training_args.bin", "trainer_state.json",
)  # fmt: skip


def test_companions_in_folders_go_along_and_twins_of_the_weights_do_not(model: Path, tmp_path: Path) -> None:
    for name in (*KEPT, *LEFT):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"content of {name}")
    out, exported = tmp_path / "out", tmp_path / "exported"
    fuse(model, out, "--budget", 0.5, "--layout", "layerwise")
    run("export", out, "--to", "gqa", "-o", exported)
    run("eval", exported, "--verify", "--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 16)
    for folder in (out, exported):
        assert all((folder / name).read_text() == f"content of {name}" for name in KEPT)
        assert not [name for name in LEFT if (folder / name.split("/")[0]).exists()]
        assert json.loads((folder / "plan.json").read_text())["files"].keys() >= set(KEPT)
    (exported / KEPT[1]).write_text("changed")
    error = failure(run("eval", exported, "--verify", "--json", code=1))
    assert "additional_chat_templates/tools.jinja has changed" in error["what"]


def failure(output: str) -> dict[str, str]:
    """The error in the JSON document, which stands beside the message on stderr."""
    document = next(line for line in output.splitlines() if line.startswith("{"))
    error: dict[str, str] = json.loads(document)["error"]
    return error


def with_model_code(model: Path) -> None:
    """A stock model type with an auto_map to code in the folder, as the hub has Phi-3."""
    edit(model / "config.json", auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    (model / "configuration_x.py").write_text("from transformers import LlamaConfig\nclass X(LlamaConfig):\n    pass\n")
    (model / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_x import X as C\n"
        "class X(LlamaForCausalLM):\n    config_class = C\n"
    )


@pytest.mark.parametrize("trust", [[], ["--trust-remote-code"]])
def test_code_of_a_stock_model_is_not_named_by_the_output(model: Path, tmp_path: Path, trust: list[str]) -> None:
    with_model_code(model)
    out, exported = tmp_path / "out", tmp_path / "exported"
    fuse(model, out, "--budget", 0.5, "--layout", "gqa", *trust)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))
    run("eval", out, "--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 16, "--trust-remote-code")
    fuse(model, tmp_path / "free", "--budget", 0.5, "--overwrite", *trust)
    raw = json.loads((tmp_path / "free/config.json").read_text())
    assert "auto_map" not in raw["source_config"]
    assert all((tmp_path / "free" / f"{name.split('.')[0]}.py").is_file() for name in raw["auto_map"].values())
    edit(out / "config.json", auto_map={"AutoConfig": "configuration_x.X"})  # as earlier versions wrote it
    run("export", out, "--to", "layerwise", "-o", exported)
    run("export", exported, "--to", "gqa", "-o", tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again/config.json").read_text())
    assert logits(tmp_path / "again").shape == (2, 20, 300)


def test_weights_that_config_json_names(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", transformers_weights="model.safetensors")
    fuse(model, tmp_path / "out", "--budget", 0.5, "--layout", "gqa")
    assert "transformers_weights" not in json.loads((tmp_path / "out/config.json").read_text())
    edit(model / "config.json", transformers_weights="other.safetensors")
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    assert "other.safetensors" in run("fuse", model, "--dry-run", code=1)


def with_tokenizer_code(model: Path) -> None:
    """A tokenizer with code of its own, which imports more of it, and marks what it reads."""
    name = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None], "AutoProcessor": "org/name--processing.P"}
    edit(model / "tokenizer_config.json", auto_map=name, tokenizer_class="OwnTokenizer")
    (model / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nfrom .words_own import OWN\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    own = OWN\n"
    )
    (model / "words_own.py").write_text("OWN = 'own'\n")
    (model / "unrelated.py").write_text("")


@pytest.mark.parametrize("layout", ["gqa", "decoupled"])
def test_trusted_code_of_a_tokenizer_goes_along(model: Path, tmp_path: Path, layout: str) -> None:
    with_tokenizer_code(model)
    out = tmp_path / "out"
    fuse(model, out, "--budget", 0.5, "--layout", layout, "--trust-remote-code")
    assert (out / "words_own.py").is_file()
    assert not (out / "unrelated.py").exists()
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True).own == "own"
    measured = ["--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 16]
    assert "--trust-remote-code" in run("eval", out, *measured, code=1)
    run("eval", out, "--verify", *measured, "--trust-remote-code")
    further = tmp_path / "further"
    if layout == "gqa":
        run("export", out, "--to", "layerwise", "-o", further, "--trust-remote-code")
    else:
        run("uptrain", out, "--data", tmp_path / "text.txt", "--tokens", 64, "--sequence-length", 16, "--batch-size", 1,
            "--loss", "ce", "-o", further, "--trust-remote-code")  # fmt: skip
    assert AutoTokenizer.from_pretrained(further, trust_remote_code=True).own == "own"


def test_untrusted_code_of_a_tokenizer_is_left_out_and_not_named(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_tokenizer_code(model)
    edit(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    out = tmp_path / "out"
    fuse(model, out, "--budget", 0.5, "--layout", "gqa")
    assert "tokenization_own.py" in caplog.text
    assert not list(out.glob("*.py"))
    raw = json.loads((out / "tokenizer_config.json").read_text())
    assert raw["auto_map"] == {"AutoProcessor": "org/name--processing.P"}, "code of another repository is still there"
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()


MEASURED = ["--sequence-length", "16"]
COMMANDS: dict[str, list[str]] = {
    "fuse": MEASURED,
    "fuse --dry-run": [],
    "analyze": MEASURED,
    "eval": [*MEASURED, "--samples", "2"],
    "uptrain": [*MEASURED, "--loss", "ce", "--data", "default", "--tokens", "64"],
    "export": ["--to", "layerwise"],
}


def command_line(command: str, model: Path, out: Path) -> list[object]:
    """A command with options that suit the tiny model."""
    output: list[object] = [] if command == "eval" else ["-o", out]
    return [*command.split(), model, *COMMANDS[command], *output]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "fuse --dry-run"])
def test_a_tokenizer_that_only_its_code_can_read(model: Path, tmp_path: Path, command: str) -> None:
    with_tokenizer_code(model)
    shutil.move(model / "tokenizer.json", model / "own.tiktoken")
    error = failure(run(*command_line(command, model, tmp_path / "out"), "--json", code=1))
    assert "--trust-remote-code" in error["fix"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alone", [False, True], ids=["beside weights", "alone"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_is_refused(model: Path, tmp_path: Path, command: str, alone: bool) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    (model / "adapter_model.safetensors").write_bytes(b"")
    for name in ("config.json", "model.safetensors") if alone else ():
        (model / name).unlink()
    error = failure(run(*command_line(command, model, tmp_path / "out"), "--json", code=1))
    assert "adapter_config.json, adapter_model.safetensors" in error["what"]
    assert "merge_and_unload" in error["fix"]
    assert not (tmp_path / "out").exists()


def test_an_adapter_merged_as_the_message_says(model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="extra lora is not installed")
    from transformers import AutoModelForCausalLM

    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(model)
    assert "adapter" in run("fuse", model, "--dry-run", code=1)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    for path in model.glob("adapter_*"):
        shutil.move(path, adapter)
    base = AutoModelForCausalLM.from_pretrained(model)
    peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(merged)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, merged)
    fuse(merged, tmp_path / "out", "--budget", 0.5)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_damaged_settings_are_refused_before_the_work(model: Path, tmp_path: Path, name: str) -> None:
    fuse(model, tmp_path / "fused", "--budget", 0.5)
    commands: dict[str, tuple[Path, tuple[object, ...]]] = {
        "fuse": (model, ("--dry-run",)),
        "export": (tmp_path / "fused", ("--to", "gqa")),
        "uptrain": (tmp_path / "fused", ("--loss", "ce", "--tokens", "1k", "--data", tmp_path / "text.txt")),
    }
    for command, (folder, options) in commands.items():
        (folder / name).write_text('{"temperature": 0.7,')
        error = failure(run(command, folder, *options, "-o", tmp_path / "out", "--json", code=1))
        assert error["where"] == str(folder / name)
        assert "is not valid JSON" in error["what"]
        assert [path.name for path in tmp_path.glob("out*")] == []
