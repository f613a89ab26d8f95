"""Bad input of every kind: one message that says where, what and what to do, exit code 1 or 2, and no output."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fuse, run, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from headfuse.cli.app import app


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
    message = f"{error['where']}: {error['what']}\n  {error['fix']}"
    return message.replace(str(out.parent), "")  # the folder has the name of the test in it


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


def beyond(content: dict[str, Any]) -> None:
    first, *_, last = (entry for name, entry in content.items() if name != "__metadata__")
    last["data_offsets"][1] += 10**9
    last["shape"] = [10**9 // 4, *first["shape"]]


def pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def swap_shards(model: Path) -> None:
    index = shard(model)
    weight_map = json.loads(index.read_text())["weight_map"]
    names = sorted(set(weight_map.values()))
    edit_json(index, weight_map={k: names[1] if v == names[0] else names[0] for k, v in weight_map.items()})


K = "model.layers.0.self_attn.k_proj.weight"


def misplace(model: Path) -> None:
    index = shard(model)
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, K: next(f for f in weight_map.values() if f != weight_map[K])})


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


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda m: shutil.rmtree(m), "no such folder"),
    "no config": (lambda m: os.remove(m / "config.json"), "this is not a model folder"),
    "config is not JSON": (config("{'model_type':"), "not valid JSON"),
    "config is a list": (config("[]"), "JSON object"),
    "config is binary": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "no model_type": (config("{}"), "model_type"),
    "unsupported family": (lambda m: edit_json(m / "config.json", model_type="mpt"), "llama, mistral,"),
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
    "vocabulary beyond 64 bits": (lambda m: edit_json(m / "config.json", vocab_size=10**30), "config.json"),
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
    "offsets beyond the file": (lambda m: header(m, beyond), "complete"),
    "negative offsets": (lambda m: header(m, lambda h: h[K].update(data_offsets=[-8, 8])), "complete"),
    "a nested header": (weights(struct.pack("<Q", 10**5) + b"[" * 10**5), "complete"),
    "integers for weights": (lambda m: header(m, lambda h: h[K].update(dtype="I32")), "holds int32 numbers"),
    "unknown dtype": (lambda m: header(m, lambda h: h[K].update(dtype="F8_E4M3")), "model.safetensors"),
    "missing shard": (lambda m: os.remove(min(shard(m).parent.glob("model-*.safetensors"))), "missing"),
    "index outside the folder": (lambda m: rename_shard(m, "../model.safetensors"), "plain file names"),
    "index with absolute path": (lambda m: rename_shard(m, "/etc/model.safetensors"), "plain file names"),
    "index into a folder": (lambda m: rename_shard(m, "sub/model.safetensors"), "plain file names"),
    "index names a pickle": (lambda m: rename_shard(m, "model.bin"), "plain file names"),
    "index without weight_map": (lambda m: edit_json(shard(m), weight_map=[]), "weight_map"),
    "index is not JSON": (lambda m: shard(m).write_text("{"), "not valid JSON"),
    "index with the wrong shards": (swap_shards, "which does not hold it"),
    "index with one wrong shard": (misplace, "which does not hold it"),
    "wrong shape": (lambda m: edit_tensors(m, lambda t: t.update({K: t[K][:8].clone()})), "k_proj"),
    "missing tensor": (lambda m: edit_tensors(m, lambda t: t.pop(K)), "k_proj.weight is missing"),
    "a third layer": (
        lambda m: edit_tensors(m, lambda t: t.update({K.replace("layers.0", "layers.2"): t[K].clone()})),
        "config.json says 2",
    ),
    "NaN": (lambda m: edit_tensors(m, lambda t: t[K][0, 0].fill_(float("nan"))), "k_proj.weight holds NaN"),
    "infinity": (lambda m: edit_tensors(m, lambda t: t["lm_head.weight"][0].fill_(float("inf"))), "infinity"),
    "a tensor in two shards": (twice, "as well"),
    "weights are a folder": (weights_folder, "no weights"),
    "tokenizer of another model": (larger_tokenizer, "the token 'reads' (id "),
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
@pytest.mark.parametrize("command", ["eval", "uptrain"])
def test_bad_models_in_the_other_commands(model: Path, tmp_path: Path, name: str, command: str) -> None:
    """What `fuse` refuses they refuse in the same way."""
    MODELS[name][0](model)
    more = ("--loss", "ce", "--tokens", 256, "-o", tmp_path / "out") if command == "uptrain" else ()
    options = ("--data", tmp_path / "text.txt", "--sequence-length", 32, "--json", *more)
    result = CliRunner().invoke(app, [str(part) for part in (command, model, *options)])
    assert result.exit_code == 1, result.output
    assert "unexpected" not in result.output
    document = json.loads(result.stdout)
    assert all(document["error"].values()), document
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


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
        (b"  \n ", "no text"),
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


def test_bad_data_folders_and_kinds(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.docx").write_text("the head")
    (tmp_path / "text.parquet").write_bytes(b"PAR1 garbage PAR1")
    out, small = tmp_path / "out", ("--sequence-length", 32)
    assert "holds no" in refused(out, model, "--data", tmp_path / "empty", *small)
    assert "rename or convert" in refused(out, model, "--data", tmp_path / "text.docx", *small)
    assert "parquet" in refused(out, model, "--data", tmp_path / "text.parquet", *small)
    (tmp_path / "lines.jsonl").write_text("\n\n")
    assert "no text" in refused(out, model, "--data", tmp_path / "lines.jsonl", *small)


def test_several_texts_need_a_token_between_them(model: Path, tmp_path: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "two.jsonl").write_text('{"text": "the head"}\n' * 2)
    message = refused(tmp_path / "out", model, "--data", tmp_path / "two.jsonl", *SMALL)
    assert message.startswith("/model: the tokenizer has no EOS token")


def test_an_empty_name_is_not_the_working_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script passes when its variable is not set."""
    data = ("--data", tmp_path / "text.txt", *SMALL)
    monkeypatch.chdir(model)
    assert refused(tmp_path / "out", "", *data).startswith("MODEL: ")
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path / "out", model, "--data", "", *SMALL).startswith("--data: ")
    assert refused(tmp_path / "out", model, "--config", "", *data).startswith("--config: ")
    assert refused(tmp_path / "out", model, "--plan", "", *data).endswith("`headfuse fuse`")


def test_a_loss_beyond_a_float_is_a_figure_all_the_same(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda tensors: tensors["lm_head.weight"].mul_(1e5))
    assert fuse(model, tmp_path / "out", "--budget", "0.5")["nll"]["before"] > 1000
    assert "| perplexity | above" in (tmp_path / "out/README.md").read_text()


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
        ("budget: {total: 0}", ["out of range"]),
        ("budget: {total: abc}", ["not a number"]),
        ("budget: {allocator: unifrom}", ["'uniform'"]),
        ("layout: gpa\nmethod: 3\nseed: -1", ["layout", "method", "seed"]),
    ],
)  # fmt: skip
def test_bad_yaml(model: Path, tmp_path: Path, text: str, expected: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    message = refused(tmp_path / "out", model, "--config", tmp_path / "bad.yaml", "--data", tmp_path / "text.txt")
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a list", "mapping"),
        ("a: [", "not valid YAML"),
        ("seed: 2024-13-45", "month"),
        (f"seed: {'9' * 5000}", "digits"),
        ("budget: {total: 0.5}\nbudget: {total: 0.75}", "'budget' is there twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_files_that_are_no_yaml_of_options(model: Path, tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    message = run("fuse", model, "-o", tmp_path / "out", "--config", tmp_path / "bad.yaml", code=1)
    assert "bad.yaml" in message
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_unknown_packaged_config(model: Path, tmp_path: Path) -> None:
    assert "headfuse-25" in refused(tmp_path / "out", model, "--config", "headfuse-26")


@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "nan", "inf", "abc", "", "1/0", "1e-999999999"])
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
    assert "--threads" in refused(out, model, "--threads", 10**6, code=2)  # more than the system gives: a crash
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
    other = json.loads(text)
    other["heads"].update(num_key_value_heads=2)
    for layer in other["layers"]:
        layer.update(key_groups=[[0, 1]], value_groups=[[0, 1]])
    plan.write_text(json.dumps(other))
    assert "another shape" in refused(tmp_path / "out", model, "--plan", plan)
    plan.write_text("{")
    assert "plan.json" in refused(tmp_path / "out", model, "--plan", plan)
    assert "no such file" in refused(tmp_path / "out", model, "--plan", tmp_path / "none.json")


OTHER_THAN_THE_PLAN = {
    "method": ("--method", "mean"),
    "layout": ("--layout", "gqa"),
    "layout, too": ("--for", "vllm"),
    "budget": ("--budget", "0.75"),
}


@pytest.mark.parametrize("name", OTHER_THAN_THE_PLAN)
def test_options_that_contradict_a_plan(model: Path, tmp_path: Path, name: str) -> None:
    fuse(model, tmp_path / "good", "--budget", "0.5")
    options = ("--plan", tmp_path / "good/plan.json", "--data", tmp_path / "text.txt", "--sequence-length", 32)
    message = refused(tmp_path / "out", model, *options, *OTHER_THAN_THE_PLAN[name])
    assert f"contradict the plan in {name.split(',')[0]}\n" in message


def test_a_plan_decides_what_nobody_else_does(tmp_path: Path) -> None:
    """The default budget is too small for this model, and is neither in the name nor in the YAML of the output."""
    model = tiny_model(tmp_path / "model", kv_heads=2)
    fuse(model, tmp_path / "good", "--budget", "0.5", "--layout", "gqa")
    options = ("--plan", tmp_path / "good/plan.json", "--data", tmp_path / "text.txt", *SMALL[:4])
    out = tmp_path / "model-headfuse-0.5"
    assert str(out) in run("fuse", model, *options, "--dry-run")
    run("fuse", model, *options)
    assert (out / "plan.json").exists()
    assert "layout: gqa" in (out / "headfuse.yaml").read_text()
    again = run("fuse", model, *options, "--config", out / "headfuse.yaml", "-o", tmp_path / "again", "-q")
    assert again.strip() == str(tmp_path / "again")
    weights = [folder / "model.safetensors" for folder in (out, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_plan_of_other_weights_is_used_with_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fuse(model, tmp_path / "good", "--budget", "0.5")
    plan = ("--plan", tmp_path / "good/plan.json")
    fuse(model, tmp_path / "same", *plan)
    assert not caplog.records
    edit_tensors(model, lambda tensors: tensors["lm_head.weight"].mul_(2))
    fuse(model, tmp_path / "out", *plan)
    assert ["made on other weights" in record.message for record in caplog.records] == [True]


def test_a_model_and_a_dataset_of_the_hub_offline(model: Path, tmp_path: Path) -> None:
    """In a process of its own: the libraries read HF_HUB_OFFLINE when they are imported."""
    code = f"""
from headfuse.cli import app
for args in (["nobody/nothing"], [{str(model)!r}, "--data", "nobody/nothing", "--sequence-length", "32"]):
    try:
        app(["fuse", *args, "-o", {str(tmp_path / "out")!r}, "--json"])
    except SystemExit as end:
        assert end.code == 1
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    for line in done.stdout.splitlines():
        error = json.loads(line)["error"]
        assert error["where"] == "nobody/nothing"
        assert "HF_HUB_OFFLINE" in error["fix"]
        assert "unexpected" not in error["what"]
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


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


@pytest.fixture
def untouched(model: Path) -> Iterator[None]:
    """The source is byte for byte what it was."""
    before = {path: path.read_bytes() for path in sorted(model.iterdir())}
    yield
    assert {path: path.read_bytes() for path in sorted(model.iterdir())} == before


OUTPUTS: dict[str, Callable[[Path], Path]] = {
    "the source": lambda model: model,
    "the source, spelt otherwise": lambda model: model.parent / "elsewhere/../model",
    "inside the source": lambda model: model / "inside",
    "deep inside the source": lambda model: model / "deep/inside",
    "around the source": lambda model: model.parent,
    "a link to the source": lambda model: link(model.parent / "link", model),
    "inside a link to the source": lambda model: link(model.parent / "link", model) / "inside",
    "a name whose .partial is the source": lambda model: link(model.parent / "other.partial", model).with_suffix(""),
}


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("command", ["fuse", "uptrain", "analyze"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("name", OUTPUTS)
def test_the_source_is_never_the_output(model: Path, name: str, options: tuple[str, ...], command: str) -> None:
    out = OUTPUTS[name](model)
    more = ("--loss", "ce", "--tokens", 64) if command == "uptrain" else ()
    data = ("--data", model.parent / "text.txt", "--sequence-length", 32)
    message = run(command, model, "-o", out, *options, *data, *more, code=1)
    assert "a source is never touched" in message


@pytest.mark.usefixtures("untouched")
def test_a_source_with_the_name_of_the_partial_folder(model: Path, tmp_path: Path) -> None:
    source = model.rename(tmp_path / "other.partial")
    for options in ([], ["--overwrite"], ["--resume"]):
        message = run("fuse", source, "-o", tmp_path / "other", *options, code=1)
        assert "a source is never touched" in message
    source.rename(model)


def test_the_working_folder_as_output(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.` has no name; with --overwrite it must not take away whatever lies there."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/mine").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    assert "the name is empty" in run("fuse", model, "-o", "", "--overwrite", code=2)
    for out in (".", "./"):
        assert "already exists" in run("fuse", model, "-o", out, code=1)
        assert "move it away" in run("fuse", model, "-o", out, "--overwrite", code=1)
    assert (tmp_path / "work/mine").read_text() == "mine"


def test_outputs_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = ("--data", tmp_path / "text.txt", *SMALL)
    assert "cannot be written" in refused(tmp_path / "file/out", model, *data)
    assert "cannot be written" in refused(Path("/proc/nowhere/out"), model, *data)
    assert "File name too long" in run("fuse", model, "-o", tmp_path / ("x" * 300), *data, code=1)


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A folder that this user may search but not write to; root becomes nobody for the time."""
    folder = Path(tempfile.mkdtemp(prefix="headfuse-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("closed", ["output", "model", "config.json", "model.safetensors", "text.txt", "plan.json"])
def test_missing_permissions(pristine: Path, guarded: Path, closed: str) -> None:
    model, text = shutil.copytree(pristine, guarded / "model"), guarded / "text.txt"
    shutil.copy(pristine.parent / "text.txt", text)
    data = ("--data", text, *SMALL)
    (guarded / "plan.json").write_text("{}")
    for file in model.iterdir():
        file.chmod(0o644)
    (guarded / "open").mkdir()
    (guarded / "open").chmod(0o777)
    places = {"model": model, "text.txt": text, "plan.json": guarded / "plan.json", "output": guarded}
    place, out = places.get(closed, model / closed), guarded / "open/out"
    if closed == "output":
        out = guarded / "out"
    else:
        place.chmod(0o000)
    with unprivileged(guarded):
        message = refused(out, model, *data, *(("--plan", place) if closed == "plan.json" else ()))
    assert "ermission" in message
    assert message.startswith("/out: " if closed == "output" else str(place))
    place.chmod(0o755)


def test_a_failure_that_nobody_foresaw_is_one_message(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("headfuse.conversion.convert.make_plan", fail)
    line = ["fuse", str(model), "-o", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt"), *map(str, SMALL)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1
    assert "\nerror: unexpected ZeroDivisionError: division by zero\n  " in result.output
    assert "--verbose" in result.output
    assert isinstance(CliRunner().invoke(app, [*line, "--verbose"]).exception, ZeroDivisionError)
    result = CliRunner().invoke(app, [*line, "--json"])
    assert "ZeroDivisionError" in json.loads(result.stdout)["error"]["what"]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("args", [("--nosuch",), ("--samples", "x"), ("--samples", "1"), ("--device", "abacus")])
def test_usage_errors_in_json(model: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    assert args[0] in refused(tmp_path / "out", model, *args, code=2)


# ---------------------------------------------------------------- a full disk


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond it, as on a disk that is full: writing fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_in_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "headfuse", "fuse", model, "-o", tmp_path / "out", "--json"]
    done = subprocess.run(
        [*map(str, line), "--data", str(tmp_path / "text.txt"), *map(str, SMALL)],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "cannot be written" in json.loads(done.stdout)["error"]["what"]
    assert not list(tmp_path.glob("out*"))


def test_full_disk_before_the_weights(model: Path, tmp_path: Path) -> None:
    with file_size_limit(50_000):
        assert "ulimit" in refused(tmp_path / "out", model, "--data", tmp_path / "text.txt", *SMALL)


def test_full_disk_while_companions_are_copied(model: Path, tmp_path: Path) -> None:
    """The weights fit, a file beside them does not; what is done can go on when there is space."""
    size = (model / "model.safetensors").stat().st_size + 4096
    (model / "LICENSE").write_text("licence\n" * size)
    data = ("--data", tmp_path / "text.txt", *SMALL)
    with file_size_limit(size):
        message = run("fuse", model, "-o", tmp_path / "out", *data, code=1)
    assert "cannot be written" in message
    assert "--resume" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
    run("fuse", model, "-o", tmp_path / "out", *data, "--resume")
    assert (tmp_path / "out/LICENSE").read_bytes() == (model / "LICENSE").read_bytes()


def test_full_disk_while_analyze_writes(model: Path, tmp_path: Path) -> None:
    with file_size_limit(1000):
        message = refused(tmp_path / "out", model, "--data", tmp_path / "text.txt", *SMALL, command="analyze")
    assert "cannot be written" in message


PAGE = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many pages; a second call changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(pages: int) -> Path:
        nonlocal mounted
        option = f"{'remount,' * mounted}size={pages * PAGE}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_at_every_size(model: Path, tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    """From too small for the weights up to one page short: whichever file is the one that fails, nothing is half done.

    Where the weights were laid out, `--resume` completes the run once there is space.
    """
    data = ("--data", tmp_path / "text.txt", *SMALL)
    run("fuse", model, "-o", tmp_path / "whole", *data)
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    weights = -(-len(files["model.safetensors"]) // PAGE)
    outcomes = set()
    for pages in range(weights - 1, weights + 100):
        disk = small_disk(pages)
        result = CliRunner().invoke(app, ["fuse", str(model), "-o", str(disk / "out"), *map(str, data)])
        if result.exit_code == 0:
            break
        assert result.exit_code == 1, result.output
        assert "No space left" in result.output
        assert "free some space" in result.output
        assert "Traceback" not in result.output
        assert not (disk / "out").exists()
        resumable = (disk / "out.partial/resume.json").exists()
        assert resumable == ("--resume" in result.output)
        assert resumable == (disk / "out.partial").exists()
        present = {file.name for file in (disk / "out.partial").iterdir()} if resumable else set()
        outcome = frozenset(present & files.keys())
        if resumable and outcome not in outcomes:
            small_disk(weights + 100)
            run("fuse", model, "-o", disk / "out", *data, "--resume")
            assert {file.name: file.read_bytes() for file in (disk / "out").iterdir()} == files
            shutil.rmtree(disk / "out")
        shutil.rmtree(disk / "out.partial", ignore_errors=True)
        outcomes.add(outcome)
    else:
        pytest.fail("never large enough")
    for name in ("config.json", "tokenizer.json"):
        assert any(name in present for present in outcomes), "no failure was after this file was begun"
    assert frozenset() in outcomes, "no failure was before the weights"
    assert len(outcomes) >= 4
