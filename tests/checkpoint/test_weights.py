"""Which weights a model has is what transformers makes of the same folder; and what a run refuses, its dry run does."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from headfuse.cli.app import app
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from tests.support.commands import fuse, run
from tests.support.model_outputs import logits
from tests.support.tiny_models import VOCABULARY, tiny_model

TOKENS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FEW = ("--samples", 4, "--sequence-length", 32)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose config ties the embeddings, as its weights are."""
    model = tiny_model(tmp_path_factory.mktemp("pristine") / "model")
    edit_json(model / "config.json", tie_word_embeddings=True)
    edit_tensors(model, lambda tensors: tensors.pop(HEAD))
    return model


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    shutil.copy(pristine.parent / "text.txt", tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def other_head(model: Path) -> None:
    """The file holds a head of its own, though config.json ties it."""
    torch.manual_seed(5)
    edit_tensors(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 0.3 * torch.randn(VOCABULARY, 32)}))


def head_alone(model: Path) -> None:
    """As accelerate writes tied embeddings: under the name of the head."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    save_model(loaded, str(model / "model.safetensors"), metadata={"format": "pt"})
    assert EMBEDDING not in load_file(model / "model.safetensors")


def same_head(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))


def in_transformers(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    return result


def streamed_logits(folder: Path) -> torch.Tensor:
    source = Source.open(str(folder))
    streamed = StreamedModel(source.checkpoint, source.config, torch.device("cpu"))
    states = streamed.embed(TOKENS)
    for layer_idx in range(streamed.num_layers):
        with streamed.layer(layer_idx, streamed.layer_tensors(layer_idx)) as layer, torch.no_grad():
            states = layer(states)
    with torch.no_grad():
        return streamed.logits(streamed.last_hidden_state(states.hidden))


TIES: dict[str, Callable[[Path], None]] = {"other": other_head, "alone": head_alone, "same": same_head}


@pytest.mark.parametrize("name", TIES)
def test_tied_weights_are_those_of_transformers(model: Path, tmp_path: Path, name: str) -> None:
    """In what is measured, in every layout, and after each further step."""
    TIES[name](model)
    expected = in_transformers(model)
    torch.testing.assert_close(streamed_logits(model), expected, rtol=1e-4, atol=1e-4)
    for layout in ("gqa", "layerwise", "decoupled"):
        out = tmp_path / layout
        fuse(model, out, "--budget", 1, "--layout", layout, "--preset", "fast")
        torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4)
        raw = json.loads((out / "config.json").read_text())
        raw = raw.get("source_config", raw)
        assert raw["tie_word_embeddings"] == (name != "other")  # as runtimes need it that go by the config alone
        assert (HEAD in load_file(out / "model.safetensors")) == (name == "other")


def test_tied_weights_in_the_other_commands(model: Path, tmp_path: Path) -> None:
    """Exports and trained folders of a folder as it came, not from `fuse`."""
    for name, change in TIES.items():
        folder = Path(shutil.copytree(model, tmp_path / name))
        change(folder)
        expected = in_transformers(folder)
        run("export", folder, "--to", "layerwise", "-o", tmp_path / f"{name}-layerwise")
        torch.testing.assert_close(logits(tmp_path / f"{name}-layerwise"), expected, rtol=1e-4, atol=1e-4)
        out = tmp_path / f"{name}-trained"
        run(
            "uptrain", folder, "--loss", "ce", "--tokens", 64, "--data", tmp_path / "text.txt", "--sequence-length", 32,
            "--batch-size", 1, "--learning-rate", 1e-9, "-o", out,
        )  # fmt: skip
        torch.testing.assert_close(in_transformers(out), expected, rtol=1e-4, atol=1e-4)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (name != "other")
        assert EMBEDDING in load_file(out / "model.safetensors")


def test_a_gguf_file_of_weights_under_the_heads_name(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for name, change in TIES.items():
        folder = Path(shutil.copytree(model, tmp_path / name))
        change(folder)
        run("export", folder, "--to", "gguf", "--type", "f32", "-o", tmp_path / f"{name}.gguf")
        names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        assert "token_embd.weight" in names
        assert ("output.weight" in names) == (name == "other")


def test_a_head_that_is_neither_tied_nor_there_is_missing(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", tie_word_embeddings=False)
    message = run("fuse", model, "-o", tmp_path / "out", "--dry-run", code=1)
    assert "tensor lm_head.weight is missing" in message
    assert "tie_word_embeddings" in message
    edit_json(model / "config.json", tie_word_embeddings=True)
    edit_tensors(model, lambda tensors: tensors.pop(EMBEDDING))
    assert f"tensor {EMBEDDING} is missing" in run("fuse", model, "-o", tmp_path / "out", "--dry-run", code=1)


# ---------------------------------------------------------------- what transformers ignores


IGNORED = [
    "v_head.summary.weight",
    "model.mtp.0.proj.weight",
    "model.layers.0.self_attn.k_scale",
    "model.layers.1.self_attn.q_proj.bias",
    "score.weight",
]


def test_what_transformers_ignores_is_left_out(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = in_transformers(model)
    edit_tensors(model, lambda tensors: tensors.update({name: torch.ones(3, 2) for name in IGNORED}))
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    found = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)[1]
    assert found["unexpected_keys"] == set(IGNORED)
    assert not found["missing_keys"]
    data, text = ("--data", tmp_path / "text.txt", "--sequence-length", 32), tmp_path / "text.txt"
    commands: dict[str, tuple[object, ...]] = {
        "fuse": ("fuse", model, "-o", tmp_path / "out", "--budget", 1, *data, "--samples", 8),
        "dry run": ("fuse", model, "--dry-run", *data),
        "analyze": ("analyze", model, *data, "--samples", 4),
        "eval": ("eval", model, *data, "--samples", 2),
        "uptrain": ("uptrain", model, "--loss", "ce", "--tokens", 64, "--batch-size", 1, *data, "-o", tmp_path / "up"),
        "export": ("export", model, "--to", "layerwise", "-o", tmp_path / "export"),
    }
    assert text.exists()
    for name, command in commands.items():
        caplog.clear()
        run(*command)
        said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert len(said) == 1, name
        assert "5 tensors" in said[0]
        assert "inv_freq" not in said[0]
    for folder in ("out", "up", "export"):
        assert not set(IGNORED) & load_file(tmp_path / folder / "model.safetensors").keys()
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=1e-4, atol=1e-4)


def test_a_needed_tensor_under_another_name_is_missing(model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.0.attn.wk.weight": tensors.pop(name)}))
    assert f"tensor {name} is missing" in run("fuse", model, "-o", tmp_path / "out", "--dry-run", code=1)


# ---------------------------------------------------------------- quantised weights


def replaced(new: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors.update(new(name.removesuffix(".weight"), tensors.pop(name)))

    return lambda model: edit_tensors(model, change)


def packed(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    return {
        f"{base}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{base}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{base}.scales": torch.ones(1, rows),
    }


def gguf_alone(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model-q4_0.gguf").write_bytes(b"GGUF")


def gguf_without_config(model: Path) -> None:
    gguf_alone(model)
    (model / "config.json").unlink()


QUANTISED: dict[str, tuple[Callable[[Path], None], str]] = {
    "GPTQ": (replaced(lambda b, w: {**packed(b, w), f"{b}.g_idx": torch.zeros(8, dtype=torch.int32)}), "GPTQ"),
    "AWQ": (replaced(packed), "AWQ"),
    "4 bits": (
        replaced(lambda b, w: {f"{b}.weight": w.to(torch.uint8), f"{b}.weight.quant_state.bitsandbytes__nf4":
                               torch.zeros(8, dtype=torch.uint8), f"{b}.weight.absmax": torch.ones(8)}),
        "bitsandbytes",
    ),
    "8 bits": (replaced(lambda b, w: {f"{b}.weight": w.to(torch.int8), f"{b}.SCB": torch.ones(8)}), "bitsandbytes"),
    "fp8": (
        replaced(lambda b, w: {f"{b}.weight": w.to(torch.float8_e4m3fn), f"{b}.weight_scale_inv": torch.ones(1, 1)}),
        "fp8",
    ),
    "fp8 without scales": (replaced(lambda b, w: {f"{b}.weight": w.to(torch.float8_e4m3fn)}), "fp8"),
    "scales": (replaced(lambda b, w: {f"{b}.weight": w, f"{b}.weight_scale": torch.ones(1)}), "scales"),
    "MLX": (
        replaced(lambda b, w: {f"{b}.weight": torch.zeros(8, 4, dtype=torch.uint32), f"{b}.scales": torch.ones(8, 1),
                               f"{b}.biases": torch.ones(8, 1)}),
        "MLX",
    ),
    "GGUF": (gguf_alone, "GGUF"),
    "GGUF without a config": (gguf_without_config, "GGUF"),
    "a config of MLX": (lambda model: edit_json(model / "config.json", quantization={"bits": 4}), "quantised"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_named_in_every_command(model: Path, tmp_path: Path, name: str) -> None:
    damage, expected = QUANTISED[name]
    damage(model)
    data = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    for command in (
        ("fuse", model, *data),
        ("fuse", model, "--dry-run", *data),
        ("analyze", model, *data),
        ("eval", model, *data),
        ("uptrain", model, "--loss", "ce", "--tokens", 64, *data),
        ("export", model, "--to", "layerwise"),
    ):
        message = run(*command, code=1)
        assert expected in message, command
        assert "full-precision model" in message, command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


# ---------------------------------------------------------------- models with another head


@pytest.mark.parametrize(
    "name",
    ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForRewardModel", "InternRewardModel"],
)
def test_models_with_another_head_are_named(model: Path, tmp_path: Path, name: str) -> None:
    edit_json(model / "config.json", architectures=[name])
    data = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    for command in (
        ("fuse", model, "--dry-run", *data),
        ("eval", model, *data),
        ("export", model, "--to", "layerwise"),
    ):
        assert f"{name} is not a causal language model" in run(*command, code=1)


def test_a_base_model_is_what_transformers_makes_of_it(model: Path, tmp_path: Path) -> None:
    """Its tensors lack the first part of their names; tied, it is a language model, else it lacks a head."""
    edit_json(model / "config.json", architectures=["LlamaModel"])
    tensors = load_file(model / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, model / "model.safetensors")
    expected = in_transformers(model)
    fuse(model, tmp_path / "out", "--budget", 1, "--layout", "gqa")
    torch.testing.assert_close(in_transformers(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    edit_json(model / "config.json", tie_word_embeddings=False)
    assert "LlamaModel is a model without a head" in run("fuse", model, "--dry-run", code=1)


# ---------------------------------------------------------------- a tokenizer with more tokens than embeddings


def more_tokens(model: Path, *words: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    room = VOCABULARY - len(tokenizer)
    tokenizer.add_tokens([AddedToken(f"<{i}>", special=True) for i in range(room)] + [AddedToken(w) for w in words])
    tokenizer.save_pretrained(model)


def test_a_larger_tokenizer_is_a_warning(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gguf")
    more_tokens(model, "[PAD]")
    data = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    for command in (
        ("fuse", model, "-o", tmp_path / "out", "--budget", 0.5, "--layout", "gqa", *data, "--samples", 4),
        ("fuse", model, "--dry-run", *data),
        ("analyze", model, *data, "--samples", 4),
        ("eval", model, *data, "--samples", 2),
        ("uptrain", model, "--loss", "ce", "--tokens", 64, "--batch-size", 1, *data, "-o", tmp_path / "up"),
        ("export", tmp_path / "out", "--to", "gguf", "-o", tmp_path / "out.gguf"),
    ):
        caplog.clear()
        run(*command)
        said = [record.getMessage() for record in caplog.records if "'[PAD]'" in record.getMessage()]
        assert len(said) == 1, command


def test_the_tokens_of_a_gguf_file_are_cut_to_the_embeddings(model: Path, tmp_path: Path) -> None:
    from tests.support.llama_cpp import LlamaCpp

    more_tokens(model, "[PAD]")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(model)
    run("export", model, "--to", "gguf", "--type", "f32", "-o", tmp_path / "out.gguf")
    expected = in_transformers(model)[0, -1].log_softmax(-1)
    found = LlamaCpp(tmp_path / "out.gguf").log_probabilities(TOKENS[0].tolist(), VOCABULARY)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_text_with_a_token_that_is_not_embedded_names_it(model: Path, tmp_path: Path) -> None:
    more_tokens(model, "reads")
    data = ("--data", tmp_path / "text.txt", "--sequence-length", 32)
    for command in (
        ("fuse", model, "-o", tmp_path / "out", *data),
        ("fuse", model, "--dry-run", *data),
        ("analyze", model, *data),
        ("eval", model, *data),
        ("uptrain", model, "--loss", "ce", "--tokens", 64, *data, "-o", tmp_path / "out"),
    ):
        assert f"the token 'reads' (id {VOCABULARY})" in run(*command, code=1), command
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the dry run


def too_long(place: Path) -> None:
    edit_json(place / "model/config.json", max_position_embeddings=16)


def shapes(place: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(place / "model", lambda tensors: tensors.update({name: tensors[name][:8].clone()}))


def closed(place: Path) -> None:
    (place / "file").write_text("")


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no weights": (lambda p: (p / "model/model.safetensors").unlink(), ()),
    "a tensor is missing": (lambda p: edit_tensors(p / "model", lambda t: t.pop("model.norm.weight")), ()),
    "a tensor has another shape": (shapes, ()),
    "no text": (lambda p: (p / "text.txt").unlink(), ()),
    "empty text": (lambda p: (p / "text.txt").write_text(""), ()),
    "short text": (lambda p: (p / "text.txt").write_text("the head"), ()),
    "no tokenizer": (lambda p: (p / "model/tokenizer.json").unlink(), ()),
    "windows beyond the positions": (too_long, ()),
    "an output that exists": (lambda p: (p / "out").mkdir(), ()),
    "something where the output is built": (lambda p: (p / "out.partial").write_text(""), ()),
    "an output inside a file": (closed, ("-o", "file/out")),
    "an output with too long a name": (lambda p: None, ("-o", "x" * 250)),
    "an output inside the model": (lambda p: None, ("-o", "model/out")),
    "a device that is not there": (lambda p: None, ("--device", "mps")),
    "a budget too small": (lambda p: None, ("--budget", "0.01")),
    "a plan that is none": (lambda p: (p / "plan.json").write_text("{"), ("--plan", "plan.json")),
    "gates that are none": (lambda p: (p / "gates.yaml").write_text("max_nll: [1"), ("--gate", "gates.yaml")),
    "a layout that does not fit": (
        lambda p: edit_json(p / "model/config.json", model_type="mistral", sliding_window=9), ("--layout", "layerwise"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_dry_run_refuses_what_the_run_does(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, options = REFUSED[name]
    damage(model.parent)
    monkeypatch.chdir(tmp_path)
    output = () if "-o" in options else ("-o", "out")
    line = ["fuse", "model", "--data", "text.txt", *map(str, FEW), *output, *options]
    before = sorted(tmp_path.rglob("*"))
    dry, real = (CliRunner().invoke(app, [*line, *more]) for more in (["--dry-run"], []))
    assert dry.exit_code == real.exit_code == 1
    errors = [result.output[result.output.index("error:") :] for result in (dry, real)]
    assert errors[0] == errors[1]
    assert "unexpected" not in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_writes_nothing_and_ends_well(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "new" / "out"
    document = json.loads(
        run("fuse", model, "--data", tmp_path / "text.txt", *FEW, "-o", out, "--dry-run", "--json").splitlines()[-1]
    )
    assert document["dry_run"]
    assert document["output"] == str(out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    data = ("--data", tmp_path / "text.txt", *FEW, "-o", tmp_path / "out")
    assert "No space left" in run("fuse", model, *data, "--dry-run", code=1)
    assert "free some space" in run("fuse", model, *data, code=1)


def test_a_dry_run_of_a_resumed_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other options than those of the interrupted run are refused in both."""

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    data = ("--data", tmp_path / "text.txt", *FEW, "-o", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("headfuse.conversion.convert.write_beside_weights", fail)
        run("fuse", model, *data, "--budget", 0.5, code=130)
    assert "--resume" in run("fuse", model, *data, "--budget", 0.5, "--dry-run", code=1)
    run("fuse", model, *data, "--budget", 0.5, "--dry-run", "--resume")
    messages = [run("fuse", model, *data, "--budget", 0.25, "--resume", *more, code=1) for more in (("--dry-run",), ())]
    errors = [message[message.index("error: ") :] for message in messages]  # without the stages before it
    assert errors[0] == errors[1]
    assert "differs in config" in messages[0]


def test_warnings_are_no_errors(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model as it should be is opened in silence."""
    with caplog.at_level(logging.INFO):
        Source.open(str(model))
    assert not caplog.records
