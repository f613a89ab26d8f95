"""Bad input of every kind: one message that says where, what and what to do, exit code 1 or 2, and no output."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fuse, run, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from headfuse.cli import app


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny model that every test copies."""
    return tiny_model(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    shutil.copy(pristine.parent / "text.txt", tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(out: Path, *args: object, code: int = 1, command: str = "fuse") -> str:
    """The message of a command that must fail: where, what and what to do; nothing at or beside the output name.

    `--json` puts the same into exactly one document on stdout.
    """
    result = CliRunner().invoke(app, [command, *map(str, args), "-o", str(out), "--json"])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert "unexpected" not in result.output, "a failure that no check foresaw"
    assert not os.path.lexists(out)
    assert not out.with_name(out.name + ".partial").exists()
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["output"] is None
    error = document["error"]
    assert error["what"]
    assert error["fix"]
    if code == 1:
        assert error["where"]
        assert result.stderr == f"error: {error['where']}: {error['what']}\n  {error['fix']}\n"
    return f"{error['where']}: {error['what']}\n  {error['fix']}"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def shard(model: Path) -> Path:
    """Save the model in shards; the path of the index."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="20KB")
    return model / "model.safetensors.index.json"


def rename_shard(model: Path, name: str) -> None:
    index = shard(model)
    weight_map = json.loads(index.read_text())["weight_map"]
    first = min(weight_map.values())
    edit_json(index, weight_map={k: name if v == first else v for k, v in weight_map.items()})


def header(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + length])
    change(content)
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlap(content: dict[str, Any]) -> None:
    first, second = (content[n] for n in list(content)[1:3])
    second["data_offsets"] = first["data_offsets"]


def pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def swap_shards(model: Path) -> None:
    index = shard(model)
    weight_map = json.loads(index.read_text())["weight_map"]
    names = sorted(set(weight_map.values()))
    edit_json(index, weight_map={k: names[1] if v == names[0] else names[0] for k, v in weight_map.items()})


def twice(model: Path) -> None:
    files = sorted(shard(model).parent.glob("model-*.safetensors"))
    save_file({**load_file(files[0]), **load_file(files[1])}, files[0], {"format": "pt"})


def weights_folder(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()


def larger_tokenizer(model: Path) -> None:
    """A word of the text gets an id that the model does not have."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([*(f"<{number}>" for number in range(40)), AddedToken("reads")])
    tokenizer.save_pretrained(model)


def weights(content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / "model.safetensors").write_bytes(content)


def config(text: str) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(text)


K = "model.layers.0.self_attn.k_proj.weight"
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda m: shutil.rmtree(m), "no such folder"),
    "no config": (lambda m: os.remove(m / "config.json"), "this is not a model folder"),
    "config is not JSON": (config("{'model_type':"), "not valid JSON"),
    "config is a list": (config("[]"), "JSON object"),
    "config is binary": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "no model_type": (config("{}"), "model_type"),
    "unsupported family": (lambda m: edit_json(m / "config.json", model_type="gpt2"), "llama, mistral, qwen2"),
    "unknown family": (lambda m: edit_json(m / "config.json", model_type="nosuch"), "nosuch"),
    "quantised": (lambda m: edit_json(m / "config.json", quantization_config={"quant_method": "gptq"}), "quantised"),
    "other hidden size": (lambda m: edit_json(m / "config.json", hidden_size=64), "config.json makes it"),
    "more layers": (lambda m: edit_json(m / "config.json", num_hidden_layers=3), "config.json says 3"),
    "fewer layers": (lambda m: edit_json(m / "config.json", num_hidden_layers=1), "config.json says 1"),
    "other head count": (lambda m: edit_json(m / "config.json", num_key_value_heads=2), "k_proj"),
    "a billion layers": (lambda m: edit_json(m / "config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "far more layers": (lambda m: edit_json(m / "config.json", num_hidden_layers=99), "config.json says 99"),
    "more query heads": (lambda m: edit_json(m / "config.json", num_attention_heads=8), "q_proj"),
    "other vocabulary": (lambda m: edit_json(m / "config.json", vocab_size=400), "config.json makes it"),
    "unknown activation": (lambda m: edit_json(m / "config.json", hidden_act="nosuch"), "nosuch"),
    "heads do not divide": (lambda m: edit_json(m / "config.json", num_key_value_heads=3), "multiple"),
    "no heads": (lambda m: edit_json(m / "config.json", num_attention_heads=0), "config.json"),
    "heads are text": (lambda m: edit_json(m / "config.json", num_attention_heads="four"), "num_attention_heads"),
    "pickled weights": (pickled, "pickled"),
    "no weights": (lambda m: os.remove(m / "model.safetensors"), "no weights"),
    "truncated weights": (
        lambda m: os.truncate(m / "model.safetensors", (m / "model.safetensors").stat().st_size - 100),
        "complete",
    ),
    "empty weights": (weights(b""), "complete"),
    "garbage": (weights(b"garbage " * 1000), "complete"),
    "huge header": (weights(struct.pack("<Q", 2**62) + b"{}"), "complete"),
    "header is no JSON": (weights(struct.pack("<Q", 4) + b"{{{{"), "complete"),
    "no tensors": (weights(struct.pack("<Q", 2) + b"{}"), "no tensors"),
    "overlapping tensors": (lambda m: header(m, overlap), "complete"),
    "unknown dtype": (lambda m: header(m, lambda h: h[K].update(dtype="F8_E4M3")), "model.safetensors"),
    "missing shard": (lambda m: os.remove(min(shard(m).parent.glob("model-*.safetensors"))), "missing"),
    "index outside the folder": (lambda m: rename_shard(m, "../model.safetensors"), "plain file names"),
    "index with absolute path": (lambda m: rename_shard(m, "/etc/model.safetensors"), "plain file names"),
    "index into a folder": (lambda m: rename_shard(m, "sub/model.safetensors"), "plain file names"),
    "index names a pickle": (lambda m: rename_shard(m, "model.bin"), "plain file names"),
    "index without weight_map": (lambda m: edit_json(shard(m), weight_map=[]), "weight_map"),
    "index is not JSON": (lambda m: shard(m).write_text("{"), "not valid JSON"),
    "index with the wrong shards": (swap_shards, "index"),
    "wrong shape": (lambda m: edit_tensors(m, lambda t: t.update({K: t[K][:8].clone()})), "k_proj"),
    "missing tensor": (lambda m: edit_tensors(m, lambda t: t.pop(K)), "k_proj.weight is missing"),
    "extra tensor": (lambda m: edit_tensors(m, lambda t: t.update(more=torch.ones(1))), "more"),
    "NaN": (lambda m: edit_tensors(m, lambda t: t[K].fill_(float("nan"))), "NaN"),
    "infinity": (lambda m: edit_tensors(m, lambda t: t["lm_head.weight"][0].fill_(float("inf"))), "infinity"),
    "a tensor in two shards": (twice, "as well"),
    "weights are a folder": (weights_folder, "no weights"),
    "tokenizer of another model": (larger_tokenizer, "more tokens than the model"),
    "no tokenizer": (lambda m: list(map(os.remove, m.glob("tokenizer*"))), "tokenizer"),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer"),
}


SMALL = ("--samples", 4, "--sequence-length", 32, "--budget", 1)


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(model: Path, tmp_path: Path, name: str) -> None:
    damage, expected = MODELS[name]
    damage(model)
    assert expected in refused(tmp_path / "out", model, "--data", tmp_path / "text.txt", *SMALL)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", ["analyze", "eval", "uptrain"])
def test_bad_models_in_the_other_commands(model: Path, tmp_path: Path, name: str, command: str) -> None:
    """They may do with what `fuse` cannot, but what they refuse they refuse in the same way."""
    MODELS[name][0](model)
    more = {"uptrain": ("--loss", "ce", "--tokens", 256, "-o", tmp_path / "out"), "analyze": ("-o", tmp_path / "out")}
    options = ("--data", tmp_path / "text.txt", "--sequence-length", 32, "--json", *more.get(command, ()))
    result = CliRunner().invoke(app, [str(part) for part in (command, model, *options)])
    assert result.exit_code in (0, 1), result.output
    assert "unexpected" not in result.output
    document = json.loads(result.stdout)
    if result.exit_code:
        assert all(document["error"].values()), document
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
    else:
        assert name in ACCEPTED[command]


ACCEPTED = {
    "analyze": set[str](),
    "eval": {"extra tensor"},
    "uptrain": set[str](),
}


def test_shards_may_be_links_out_of_the_folder(model: Path, tmp_path: Path) -> None:
    """As in the cache of the hub."""
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(shard(model).parent.glob("model-*.safetensors"))):
        file.rename(tmp_path / f"blobs/{number}")
        file.symlink_to(tmp_path / f"blobs/{number}")
    assert fuse(model, tmp_path / "out", "--budget", "0.5")["kv_ratio"] == 0.5


def test_activations_that_are_not_finite(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda t: [t[f"model.layers.1.mlp.{name}_proj.weight"].fill_(1e38) for name in ("up", "down")])
    assert "layer 1" in refused(tmp_path / "out", model, "--data", tmp_path / "text.txt", *SMALL)


def test_weights_beyond_the_range_of_the_dtype(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda tensors: tensors["lm_head.weight"][0].fill_(1e5))
    data = ("--data", tmp_path / "text.txt", *SMALL)
    message = run("fuse", model, "-o", tmp_path / "out", *data, "--dtype", "float16", code=1)
    assert "lm_head.weight is beyond the range of float16" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such"),
        (b"", "no text"),
        (b"  \n ", "are needed"),
        (b"the head", "are needed"),
        (b"\x00\xff\xfe\x01" * 100, "UTF-8"),
    ],
)
def test_bad_text(model: Path, tmp_path: Path, content: bytes | None, expected: str) -> None:
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    message = refused(tmp_path / "out", model, "--data", data, "--sequence-length", 32)
    assert "data.txt" in message
    assert expected in message


@pytest.mark.parametrize("content", ["{", "[]", '{"no": "text"}', '{"text": 3}', '"only a string"'])
def test_bad_jsonl(model: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content + "\n")
    assert "data.jsonl" in refused(tmp_path / "out", model, "--data", tmp_path / "data.jsonl", "--sequence-length", 32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bugdet: {total: 0.5}", ["bugdet", "'budget'"]),
        ("budget: {totl: 0.5}\ncalibration: {sample: 8}\nmethod: subspaces",
         ["'total'", "'samples'", "'subspace'"]),
        ("budget: {total: [1]}\nseed: x", ["budget.total", "seed"]),
        ("budget: 3", ["budget"]),
        ("budget: {total: .nan}", ["budget.total"]),
        ("budget: {total: 2}", ["out of range"]),
        ("budget: {total: 0.5, key_heads: [1, 1], value_heads: [1, 1]}", ["not both"]),
        ("budget: {keep_layers: [7]}", ["keep_layers"]),
        ("budget: {min_key_heads: 9}", ["min_key_heads"]),
        ("layout: gqa\nbudget: {total: 0.75, keep_layers: [0]}", ["gqa"]),
        ("calibration: {held_out: 1}", ["held_out"]),
        ("calibration: {samples: 1}", ["samples"]),
        ("- a list", ["mapping"]),
        ("a: [", ["not valid YAML"]),
        ("!!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)  # fmt: skip
def test_bad_yaml(model: Path, tmp_path: Path, text: str, expected: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    message = refused(tmp_path / "out", model, "--config", tmp_path / "bad.yaml", "--data", tmp_path / "text.txt")
    assert all(part in message for part in expected), message


def test_unknown_packaged_config(model: Path, tmp_path: Path) -> None:
    assert "headfuse-25" in refused(tmp_path / "out", model, "--config", "headfuse-26")


@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "nan", "inf", "abc", "", "1/0"])
def test_bad_budgets_are_usage_errors(model: Path, tmp_path: Path, budget: str) -> None:
    assert "--budget" in refused(tmp_path / "out", model, f"--budget={budget}", code=2)


@pytest.mark.parametrize("layout", ["decoupled", "gqa"])
def test_a_budget_below_one_head_names_the_smallest(model: Path, tmp_path: Path, layout: str) -> None:
    assert "1/4" in refused(tmp_path / "out", model, "--budget", "0.1", "--layout", layout)


def test_bad_options(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "did you mean 'align'" in refused(out, model, "--method", "aling")
    assert "--for" in refused(out, model, "--for", "vllm", "--layout", "decoupled")
    refused(out, model, "--layout", "other", code=2)
    assert "positions" in refused(out, model, "--sequence-length", 4096)
    if not torch.cuda.is_available():
        assert "--device" in refused(
            out, model, "--device", "cuda", "--data", tmp_path / "text.txt", "--sequence-length", 32
        )


def test_bad_plans(model: Path, tmp_path: Path) -> None:
    fuse(model, tmp_path / "good", "--budget", "0.5")
    plan = tmp_path / "plan.json"
    text = (tmp_path / "good/plan.json").read_text()
    damages: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda p: p["heads"].update(num_hidden_layers=3), "layers must be numbered"),
        (lambda p: p["heads"].update(hidden_size=64), "another shape"),
        (lambda p: p["layers"][0].update(key_groups=[[0, 1], [1, 2, 3]]), "exactly one group"),
        (lambda p: p.update(method="nosuch"), "nosuch"),
        (lambda p: p.update(unknown=1), "unknown"),
    ]
    for damage, expected in damages:
        content = json.loads(text)
        damage(content)
        plan.write_text(json.dumps(content))
        assert expected in refused(tmp_path / "out", model, "--plan", plan)
    plan.write_text("{")
    assert "plan.json" in refused(tmp_path / "out", model, "--plan", plan)
    assert "no such file" in refused(tmp_path / "out", model, "--plan", tmp_path / "none.json")


def test_hub_ids_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = command("fuse", "nobody/nothing", "-o", tmp_path / "out", env=environment)
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_left_alone(model: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    assert "--overwrite" in run("fuse", model, "-o", out, code=1)
    assert (out if kind == "file" else out / "mine").read_text() == "mine"
    # --overwrite is for models: what is no model folder stays even then
    assert "move it away" in run("fuse", model, "-o", out, "--overwrite", code=1)
    assert (out if kind == "file" else out / "mine").read_text() == "mine"


def test_overwrite_replaces_a_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fuse(model, out, "--budget", "0.25")
    fuse(model, out, "--budget", "0.5", "--overwrite")
    assert json.loads((out / "plan.json").read_text())["budget"] == "0.5"
    assert not out.with_name("out.partial").exists()


def test_the_source_is_never_the_output(model: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    for out in (model, tmp_path / "x/../model", model / "inside", tmp_path):
        message = run("fuse", model, "-o", out, "--overwrite", "--data", tmp_path / "text.txt", code=1)
        assert "source" in message
        assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    link = tmp_path / "link"
    link.symlink_to(model)
    assert "source" in run("fuse", model, "-o", link, "--overwrite", code=1)


def test_outputs_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = ("--data", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 32)
    assert "cannot be written" in run("fuse", model, "-o", tmp_path / "file/out", *data, code=1)
    assert "cannot be written" in run("fuse", model, "-o", "/proc/nowhere/out", *data, code=1)


def test_json_reports_a_failure_in_one_document(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    done = command("fuse", model, "-o", tmp_path / "out", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert document["output"] is None
    assert document["error"]["where"].endswith("config.json")
    assert document["error"]["fix"]


def command(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    line = [sys.executable, "-m", "headfuse.cli", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.parametrize("limit", [50_000, 8_000])
def test_full_disk_by_file_size_limit(model: Path, tmp_path: Path, limit: int) -> None:
    small = model / "tokenizer.json"
    if limit < 50_000:  # let the weights pass and a file beside them fail
        limit = (model / "model.safetensors").stat().st_size + 4096
        content = json.loads(small.read_text())
        small.write_text(json.dumps(content) + " " * (2 * limit))
    done = command(
        "fuse", model, "-o", tmp_path / "out", "--data", tmp_path / "text.txt", "--samples", 4,
        "--sequence-length", 32, "--budget", 1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_full_disk_on_a_small_file_system(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        done = command(
            "fuse", model, "-o", small / "out", "--data", tmp_path / "text.txt", "--samples", 4,
            "--sequence-length", 32, "--budget", 1,
        )  # fmt: skip
        assert done.returncode == 1
        assert "free some space" in done.stderr
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
