"""Bad models: one message that says where, what and what to do, exit code 1, and no output."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from headfuse.cli.app import app
from tests.robustness.refusals import SMALL, refused
from tests.support.commands import fuse, run
from tests.support.model_edits import edit_json, edit_tensors


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
    "unsupported family": (
        lambda m: edit_json(m / "config.json", model_type="mpt"),
        "model_type 'mpt' is not supported: its attention has",
    ),
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


def test_a_model_and_a_dataset_of_the_hub_offline(model: Path, tmp_path: Path) -> None:
    """In a process of its own: the libraries read HF_HUB_OFFLINE when they are imported."""
    code = f"""
from headfuse.cli.app import app
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
